"""Fusion weights as SVG: for pages, for notebooks, and as a file.

A row is an adapter, a cell a layer. A cell has one ink, more opaque the more the adapter weighs; a
dot marks the adapter that weighs most at a layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qaflora_edge.show.text import clean, crop, facts, len_pixels, why_alone

if TYPE_CHECKING:
    from qaflora_edge.weighing.numbers import FusionWeights

EQUAL = 1e-6  # weights are shares in float32: closer ones are one weight
TICK = 5  # a label at every fifth layer
CELL_WIDTH, CELL_HEIGHT = 18, 26
NAME_WIDTH_MAX, MEAN_WIDTH = 180, 52
NOTEBOOK_INK = "#2f81d0"  # reads on light and on dark paper


def scale(fusions: Sequence[FusionWeights]) -> tuple[float, float]:
    """The ends of the colour scale: the lowest weight rounded down, not below 0, and the largest
    rounded up.

    Both are tenths up to 1, then whole numbers. Eight adapters share a sum of 1, and on a scale
    from 0 to 1 all of them would look alike.
    """
    largest = max((float(f.weights.max()) for f in fusions if f.weights.size), default=1.0)
    if largest <= 0.0:
        return 0.0, 1.0
    step = 10 if largest < 1.0 else 1
    high = math.ceil((largest - EQUAL) * step) / step or 1 / step
    low = max(0.0, math.floor((min_weight(fusions) + EQUAL) * step) / step)
    return (low if low < high else 0.0), high


def min_weight(fusions: Sequence[FusionWeights]) -> float:
    """The lowest weight of all queries."""
    return min((float(f.weights.min()) for f in fusions if f.weights.size), default=0.0)


def leading_layers(fusion: FusionWeights) -> list[list[int]]:
    """The layers at which each adapter weighs more than every other: a list per adapter.

    Weights that differ by less than 1e-6 count as equal, and then no adapter leads the layer.
    """
    leads: list[list[int]] = [[] for _ in fusion.adapters]
    for layer, column in enumerate(fusion.weights.T.tolist()):
        largest = max(column, default=0.0)
        near = [index for index, weight in enumerate(column) if largest - weight < EQUAL]
        if len(near) == 1 and largest > 0:
            leads[near[0]].append(layer)
    return leads


def notebook_html(fusion: FusionWeights) -> str:
    """Show weights in a notebook: how they came about, the cells, the scale."""
    ends = scale([fusion])
    lines = [
        f"<div>{clean(facts([fusion]))}</div>",
        *([] if fusion.weights.any() else [f"<div>{clean(why_alone(fusion))}</div>"]),
        *panel(fusion, ends, ink=NOTEBOOK_INK, paper="#ffffff"),
        *legend(ends, min_weight([fusion]), ink=NOTEBOOK_INK),
    ]
    return "\n".join(lines)


def picture(labelled: Sequence[tuple[str, FusionWeights]], subject: str) -> str:
    """Draw an SVG file that stands alone: a panel per query, all on one scale.

    labelled  a label and the weights of each query
    subject   names of bundle and base, which stand above the panels
    """
    fusions = [fusion for _, fusion in labelled]
    ends, width = scale(fusions), max(max(map(panel_width, fusions)), 460) + 32
    parts, y = [_text(16, 28, crop(subject, width - 32, len_pixels), size=15)], 64
    for label, fusion in labelled:
        lines = panel(fusion, ends, ink=NOTEBOOK_INK, paper="#ffffff")
        lines[0] = lines[0].replace("<svg ", f'<svg x="16" y="{y}" ', 1)
        parts += [_text(16, y - 10, crop(label, width - 32, len_pixels)), *lines]
        y += len(fusion.adapters) * CELL_HEIGHT + 56
    key = legend(ends, min_weight(fusions), ink=NOTEBOOK_INK)
    key[0] = key[0].replace("<svg ", f'<svg x="16" y="{y - 16}" ', 1)
    parts += [*key, _text(16, y + 24, facts(fusions), size=11)]
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{y + 36}" '
        'font-family="sans-serif" color="#808890" fill="currentColor">'
    )
    return "\n".join([head, *parts, "</svg>", ""])


def panel_width(fusion: FusionWeights) -> int:
    """Width of a panel in pixels."""
    n_layer: int = fusion.weights.shape[1]
    return max(_left(fusion) + n_layer * CELL_WIDTH + MEAN_WIDTH, 240)


def panel(fusion: FusionWeights, ends: tuple[float, float], *, ink: str, paper: str) -> list[str]:
    """Rows of cells with the adapters' names before and their means behind, ticks below."""
    n_adapter, n_layer = fusion.weights.shape
    left, bottom = _left(fusion), n_adapter * CELL_HEIGHT
    right = left + n_layer * CELL_WIDTH
    width, height = panel_width(fusion), bottom + 24
    parts = [
        f'<svg class="map" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'fill="currentColor" font-size="13" role="img" '
        'aria-label="Weights, a row per adapter and a column per layer">'
    ]
    for row, (name, leads) in enumerate(zip(fusion.adapters, leading_layers(fusion), strict=True)):
        y = row * CELL_HEIGHT
        parts.append('<g class="row">')
        parts.append(_text(left - 8, y + 17, short_name(name), anchor="end"))
        for layer in range(n_layer):
            parts.append(_cell(fusion, row, layer, left + layer * CELL_WIDTH, y, ends, ink))
        for layer in leads:
            fill = paper if _share(fusion, row, layer, ends) > 0.5 else ink
            parts.append(
                f'<circle class="lead" cx="{left + (layer + 0.5) * CELL_WIDTH:g}" '
                f'cy="{y + CELL_HEIGHT - 7}" r="2" fill="{fill}"/>'
            )
        parts.append(_text(right + 10, y + 17, f"{float(fusion.weights[row].mean()):.2f}"))
        parts.append("</g>")
    parts += [
        _text(left + (layer + 0.5) * CELL_WIDTH, bottom + 14, str(layer), anchor="middle", size=10)
        for layer in range(n_layer)
        if layer % TICK == 0 or (layer == n_layer - 1 and layer % TICK > 1)
    ]
    return [*parts, _text(right + 10, bottom + 14, "mean", size=10), "</svg>"]


def cell_title(fusion: FusionWeights, row: int, layer: int) -> str:
    """What a cell says when it is pointed at."""
    lines = [
        f"{fusion.adapters[row]}, layer {layer}",
        f"weight {float(fusion.weights[row, layer]):.3f}",
    ]
    if fusion.divergence is not None:
        what = fusion.measured
        lines.append(f"{what.name} {float(fusion.divergence[row, layer]):.3g}{what.unit}")
    return "\n".join(lines)


def legend(ends: tuple[float, float], lowest: float, *, ink: str) -> list[str]:
    """The scale, the mark of negative weights where there are any, and the dot."""
    steps, left = 20, 68
    parts = [
        '<svg class="legend" width="460" height="16" viewBox="0 0 460 16" fill="currentColor" '
        f'role="img" aria-label="Scale: weight {ends[0]:g} to {ends[1]:g}">',
        _text(0, 10, f"weight {ends[0]:g}", size=11),
    ]
    parts += [
        f'<rect x="{left + 5 * step}" y="0" width="5" height="12" fill="{ink}" '
        f'fill-opacity="{step / (steps - 1):.2f}"/>'
        for step in range(steps)
    ]
    parts.append(_text(left + 5 * steps + 6, 10, f"{ends[1]:g}", size=11))
    parts.append(f'<circle cx="226" cy="6" r="2.5" fill="{ink}"/>')
    parts.append(_text(236, 10, legend_words(lowest), size=11))
    return [*parts, "</svg>"]


def legend_words(lowest: float) -> str:
    """What a dot means, and the mark of a weight below 0 where there is one."""
    words = "weighs most at this layer"
    return words + (f"; − below 0, down to {lowest:.3g}" if lowest < 0 else "")


def short_name(name: str) -> str:
    """An adapter's name as it stands before its row."""
    return crop(name, NAME_WIDTH_MAX, len_pixels)


def _text(x: float, y: float, content: str, *, anchor: str = "start", size: int = 13) -> str:
    place = f' text-anchor="{anchor}"' if anchor != "start" else ""
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}"{place}>{clean(content)}</text>'


def _left(fusion: FusionWeights) -> int:
    longest = max((len_pixels(short_name(name)) for name in fusion.adapters), default=30)
    return math.ceil(longest) + 12


def _share(fusion: FusionWeights, row: int, layer: int, ends: tuple[float, float]) -> float:
    low, high = ends
    return max(0.0, min(1.0, (float(fusion.weights[row, layer]) - low) / (high - low)))


def _cell(
    fusion: FusionWeights, row: int, layer: int, x: int, y: int, ends: tuple[float, float], ink: str
) -> str:
    share = _share(fusion, row, layer, ends)
    parts = (
        f'<rect class="cell" x="{x}" y="{y}" width="{CELL_WIDTH - 1}" height="{CELL_HEIGHT - 2}" '
        f'fill="{ink}" fill-opacity="{share:.3f}" stroke="{ink}" stroke-opacity="0.15">'
        f"<title>{clean(cell_title(fusion, row, layer))}</title></rect>"
    )
    if fusion.weights[row, layer] < 0:
        parts += _text(x + CELL_WIDTH / 2 - 0.5, y + 16, "−", anchor="middle")
    return parts
