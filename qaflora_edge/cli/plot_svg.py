"""Fusion weights as SVG: a panel per prompt, a row per adapter, a cell per layer.

A cell is one ink, the more opaque the more the adapter weighs, so that a page can choose ink and
paper; a dot marks the adapter that weighs most at a layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from qaflora_edge.cli.heatmap import TICK, min_weight, scale_top
from qaflora_edge.cli.plot_text import crop, len_pixels, spelt
from qaflora_edge.cli.show import leading_layers

if TYPE_CHECKING:
    from qaflora_edge.cli.prompts import Prompt
    from qaflora_edge.weighing.numbers import FusionWeights

INK, PAPER, TEXT, QUIET = "#0b4f8a", "#ffffff", "#1b1f24", "#57606a"
CELL_WIDTH, CELL_HEIGHT = 18, 26
MARGIN, NAME_WIDTH_MAX, TITLE_TOP = 16, 180, 58
MEAN_WIDTH = 52
COLUMNS_WIDTH_MAX = 1600
FONT = "system-ui, -apple-system, 'Segoe UI', sans-serif"


def svg(weighed: Sequence[tuple[Prompt, FusionWeights]]) -> str:
    """One picture with a panel per prompt, in as many columns as keep it from being a strip."""
    fusions = [fusion for _, fusion in weighed]
    top = scale_top(fusions)
    panel_width, panel_height = panel_size(fusions[0])
    panel_height += 22  # its title
    n_column = n_columns(len(weighed), COLUMNS_WIDTH_MAX // (panel_width + MARGIN))
    n_row = math.ceil(len(weighed) / n_column)
    width = max(MARGIN + n_column * (panel_width + MARGIN), 480)
    height = TITLE_TOP + n_row * (panel_height + MARGIN) + 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="{escape(FONT)}" font-size="13" fill="{TEXT}">',
        f'<rect width="{width}" height="{height}" fill="{PAPER}"/>',
        text(MARGIN, 26, "Weight of each adapter at each layer", size=16),
        text(MARGIN, 46, facts(fusions), colour=QUIET),
    ]
    for index, (prompt, fusion) in enumerate(weighed):
        x = MARGIN + index % n_column * (panel_width + MARGIN)
        y = TITLE_TOP + index // n_column * (panel_height + MARGIN)
        title = crop(panel_title(index, prompt, len(weighed)), panel_width, len_pixels)
        parts += [
            f'<g transform="translate({x} {y})">',
            text(0, 14, title),
            '<g transform="translate(0 22)">',
            *panel(fusion, top),
            "</g></g>",
        ]
    parts += [
        f'<g transform="translate({MARGIN} {height - 30})">',
        *legend(top, min_weight(fusions), ink=INK),
        "</g>",
    ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def n_columns(n_panel: int, n_fitting: int) -> int:
    """Columns for panels about three times as wide as high, so that the whole is about square."""
    return max(1, min(n_fitting, round(math.sqrt(n_panel / 3))))


def panel_size(fusion: FusionWeights) -> tuple[int, int]:
    """Width and height of a panel."""
    n_adapter, n_layer = fusion.weights.shape
    width = _left(fusion) + n_layer * CELL_WIDTH + MEAN_WIDTH
    return max(width, 240), n_adapter * CELL_HEIGHT + 24


def panel(fusion: FusionWeights, top: float, *, ink: str = INK, paper: str = PAPER) -> list[str]:
    """Rows of cells with the adapters' names before and their means behind, ticks below."""
    n_adapter, n_layer = fusion.weights.shape
    left, bottom = _left(fusion), n_adapter * CELL_HEIGHT
    right = left + n_layer * CELL_WIDTH
    leads = leading_layers(fusion)
    parts = []
    for row, name in enumerate(fusion.adapters):
        y = row * CELL_HEIGHT
        parts.append('<g class="row">')
        parts.append(text(left - 8, y + 17, short_name(name), anchor="end"))
        parts += [
            _cell(fusion, row, layer, left + layer * CELL_WIDTH, y, top, ink)
            for layer in range(n_layer)
        ]
        fills = ink, paper, top / 2
        parts += [_lead(fusion, row, layer, left, y, fills) for layer in leads[row]]
        parts.append(text(right + 10, y + 17, f"{float(fusion.weights[row].mean()):.2f}"))
        parts.append("</g>")
    parts += [
        text(left + (layer + 0.5) * CELL_WIDTH, bottom + 14, str(layer), anchor="middle", size=10)
        for layer in range(n_layer)
        if layer % TICK == 0 or (layer == n_layer - 1 and layer % TICK > 1)
    ]
    parts.append(text(right + 10, bottom + 14, "mean", size=10))
    return parts


def cell_title(fusion: FusionWeights, row: int, layer: int) -> str:
    """What a cell says when it is pointed at."""
    lines = [
        f"{fusion.adapters[row]}, layer {layer}",
        f"weight {float(fusion.weights[row, layer]):.3f}",
    ]
    if fusion.divergence is not None:
        lines.append(f"divergence {float(fusion.divergence[row, layer]):.3g}{unit(fusion)}")
    return "\n".join(lines)


def unit(fusion: FusionWeights) -> str:
    """The unit of a strategy's divergence, with a space before it."""
    return " nats" if fusion.strategy in ("qa-flora", "calibrated") else ""


def legend(top: float, lowest: float, *, ink: str) -> list[str]:
    """The scale, the mark of negative weights where there are any, and the dot."""
    steps = 20
    parts = [text(0, 10, "weight 0", size=11)]
    parts += [
        f'<rect x="{52 + 5 * step}" y="0" width="5" height="12" fill="{ink}" '
        f'fill-opacity="{step / (steps - 1):.2f}"/>'
        for step in range(steps)
    ]
    parts.append(text(52 + 5 * steps + 6, 10, f"{top:g}", size=11))
    parts.append(f'<circle cx="210" cy="6" r="2.5" fill="{ink}"/>')
    says = "weighs most at this layer"
    if lowest < 0:
        says += f"; − below 0, down to {lowest:.3g}"
    parts.append(text(220, 10, says, size=11))
    return parts


def facts(fusions: Sequence[FusionWeights]) -> str:
    """How the weights came about, in what all queries share."""
    first = fusions[0]
    parts = [f"strategy {first.strategy}"]
    if first.divergence is not None:
        parts.append(f"lens {first.lens}, pool {first.pool}")
    if len(fusions) == 1:
        parts.append(f"{first.prompt_tokens} prompt tokens")
    return ", ".join(parts)


def panel_title(index: int, prompt: Prompt, n_prompt: int) -> str:
    """What stands above a panel: its prompt, with a number where there are several."""
    return prompt.label if n_prompt == 1 else f"{index + 1}. {prompt.label}"


def short_name(name: str) -> str:
    """An adapter's name as it stands before its row."""
    return crop(name, NAME_WIDTH_MAX, len_pixels)


def clean(text: str) -> str:
    """A text for HTML or XML: escaped, and with what XML forbids or what turns text spelt out."""
    return escape(spelt(text))


def text(
    x: float, y: float, content: str, *, anchor: str = "start", size: int = 13, colour: str = ""
) -> str:
    """A text element; without a colour it is the picture's."""
    fill = f' fill="{colour}"' if colour else ""
    place = f' text-anchor="{anchor}"' if anchor != "start" else ""
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}"{place}{fill}>{clean(content)}</text>'


def _left(fusion: FusionWeights) -> int:
    longest = max((len_pixels(short_name(name)) for name in fusion.adapters), default=30)
    return math.ceil(longest) + 12


def _cell(fusion: FusionWeights, row: int, layer: int, x: int, y: int, top: float, ink: str) -> str:
    weight = float(fusion.weights[row, layer])
    share = max(0.0, min(1.0, weight / top))
    parts = (
        f'<rect class="cell" x="{x}" y="{y}" width="{CELL_WIDTH - 1}" height="{CELL_HEIGHT - 2}" '
        f'fill="{ink}" fill-opacity="{share:.3f}" stroke="{ink}" stroke-opacity="0.15">'
        f"<title>{clean(cell_title(fusion, row, layer))}</title></rect>"
    )
    if weight < 0:
        parts += text(x + CELL_WIDTH / 2 - 0.5, y + 16, "−", anchor="middle")
    return parts


def _lead(
    fusion: FusionWeights, row: int, layer: int, left: int, y: int, fills: tuple[str, str, float]
) -> str:
    """The dot of the adapter that weighs most: of ink on a light cell, of paper on a dark one."""
    ink, paper, dark = fills
    return (
        f'<circle class="lead" cx="{left + (layer + 0.5) * CELL_WIDTH:g}" '
        f'cy="{y + CELL_HEIGHT - 7}" r="2" '
        f'fill="{paper if fusion.weights[row, layer] > dark else ink}"/>'
    )
