"""Fusion weights as a picture: SVG and HTML written here, PNG by matplotlib."""

from __future__ import annotations

import importlib.util
import io
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from qaflora_edge.errors import OutputFileError
from qaflora_edge.files import atomic_path, write_text_atomic

if TYPE_CHECKING:
    from qaflora_edge.fusion import FusionWeights

CELL_WIDTH, CELL_HEIGHT, MARGIN, TOP = 18, 28, 16, 60
LOW, HIGH = (247, 247, 242), (23, 78, 120)  # RGB of the weights 0 and 1


def check_can_plot(path: Path) -> None:
    """Fail before the work, not after it: PNG needs matplotlib.

    Raises OutputFileError.
    """
    if path.suffix.lower() == ".png" and importlib.util.find_spec("matplotlib") is None:
        raise OutputFileError(
            f"Cannot write {path}: PNG needs matplotlib, which is not installed. Install it with "
            "`pip install qaflora-edge[plot]`, or name a file that ends in .svg or .html."
        )


def write_plot(path: Path, fusion: FusionWeights) -> None:
    """Draw the weights; the suffix chooses .svg, .html or .png."""
    suffix = path.suffix.lower()
    if suffix == ".png":
        data = png(fusion)
        with atomic_path(path) as temporary:
            temporary.write_bytes(data)
    else:
        write_text_atomic(path, html(fusion) if suffix == ".html" else svg(fusion))


def svg(fusion: FusionWeights) -> str:
    """A heatmap: a row per adapter with its mean, a column per layer."""
    n_adapter, n_layer = fusion.weights.shape
    left = MARGIN + 8 * max([4, *(len(name) for name in fusion.adapters)]) + 8
    width = max(left + n_layer * CELL_WIDTH + 80, 460)
    height = TOP + n_adapter * CELL_HEIGHT + 70
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="system-ui, sans-serif" font-size="13" fill="#222">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        _text(MARGIN, 24, "Weight of each adapter at each layer", "start", size=16),
        _text(MARGIN, 44, _facts(fusion), "start", colour="#666"),
    ]
    for row, name in enumerate(fusion.adapters):
        y = TOP + row * CELL_HEIGHT
        weights = [float(weight) for weight in fusion.weights[row]]
        parts.append(_text(left - 8, y + 18, name, "end"))
        parts += [_cell(left, y, name, layer, weight) for layer, weight in enumerate(weights)]
        mean = f"{sum(weights) / len(weights):.2f}"
        parts.append(_text(left + n_layer * CELL_WIDTH + 8, y + 18, mean, "start"))
    bottom = TOP + n_adapter * CELL_HEIGHT
    parts += [
        _text(left + (layer + 0.5) * CELL_WIDTH, bottom + 16, str(layer), "middle", size=10)
        for layer in range(n_layer)
        if layer % 5 == 0 or (layer == n_layer - 1 and layer % 5 > 1)
    ]
    parts.append(_text(left + n_layer * CELL_WIDTH + 8, bottom + 16, "mean", "start", size=10))
    parts += _legend(left, bottom + 34)
    return "\n".join([*parts, "</svg>"]) + "\n"


def html(fusion: FusionWeights) -> str:
    """One file with the heatmap and the numbers as a table."""
    head = "".join(f"<th>{layer}</th>" for layer in range(fusion.weights.shape[1]))
    rows = [
        f"<tr><th>{escape(name)}</th><td><b>{float(row.mean()):.3f}</b></td>"
        + "".join(f"<td>{float(weight):.3f}</td>" for weight in row)
        + "</tr>"
        for name, row in zip(fusion.adapters, fusion.weights, strict=True)
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        "<title>qaflora weights</title>\n<style>\n"
        "body { font-family: system-ui, sans-serif; margin: 2em; color: #222; }\n"
        "svg { max-width: 100%; height: auto; }\n"
        "div { overflow-x: auto; }\n"
        "table { border-collapse: collapse; font-size: 12px; }\n"
        "th, td { padding: 2px 6px; text-align: right; border-bottom: 1px solid #ddd; }\n"
        f"</style>\n</head>\n<body>\n{svg(fusion)}<div>\n<table>\n"
        f"<tr><th>layer</th><th>mean</th>{head}</tr>\n" + "\n".join(rows) + "\n"
        "</table>\n</div>\n</body>\n</html>\n"
    )


def png(fusion: FusionWeights) -> bytes:
    """The same heatmap by matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    n_adapter, n_layer = fusion.weights.shape
    ends = [tuple(channel / 255 for channel in colour) for colour in (LOW, HIGH)]
    figure = Figure(figsize=(2 + 0.25 * n_layer, 1.6 + 0.4 * n_adapter), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(
        fusion.weights,
        cmap=LinearSegmentedColormap.from_list("weights", ends),
        vmin=0,
        vmax=1,
        aspect="auto",
    )
    axes.set_yticks(range(n_adapter), fusion.adapters)
    axes.set_xlabel("layer")
    axes.set_title(f"Weight of each adapter at each layer\n{_facts(fusion)}", fontsize=10)
    figure.colorbar(image)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def _facts(fusion: FusionWeights) -> str:
    lens = f", lens {fusion.lens}, pool {fusion.pool}" if fusion.divergence is not None else ""
    return f"{fusion.strategy}{lens}, {fusion.prompt_tokens} prompt tokens"


def _colour(weight: float) -> str:
    share = max(0.0, min(1.0, weight))
    red, green, blue = (
        round(low + share * (high - low)) for low, high in zip(LOW, HIGH, strict=True)
    )
    return f"#{red:02x}{green:02x}{blue:02x}"


def _cell(left: int, y: int, name: str, layer: int, weight: float) -> str:
    return (
        f'<rect x="{left + layer * CELL_WIDTH}" y="{y}" width="{CELL_WIDTH - 1}" '
        f'height="{CELL_HEIGHT - 2}" fill="{_colour(weight)}">'
        f"<title>{escape(name)}, layer {layer}: {weight:.3f}</title></rect>"
    )


def _legend(left: int, y: int) -> list[str]:
    steps = 20
    bar = [
        f'<rect x="{left + 4 * step}" y="{y}" width="4" height="10" '
        f'fill="{_colour(step / (steps - 1))}"/>'
        for step in range(steps)
    ]
    return [
        _text(left - 8, y + 9, "0", "end", size=10),
        *bar,
        _text(left + 4 * steps + 6, y + 9, "1", "start", size=10),
    ]


def _text(
    x: float, y: float, text: str, anchor: str, *, size: int = 13, colour: str = "#222"
) -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-size="{size}" '
        f'fill="{colour}">{escape(text)}</text>'
    )
