"""Weights as an SVG file that stands alone: nothing in it asks a host or runs.

What a model wrote is escaped text. A cell's title, shown where one points at it, has its numbers.
"""

import math
from typing import TYPE_CHECKING
from xml.etree.ElementTree import Element, SubElement, tostring

from qaflora_edge.show.text import TICK, below_zero, crop, facts, reason_rows, scale, spelt

if TYPE_CHECKING:
    from qaflora_edge.weighing.plan import FusionWeights

# Pixels.
CELL_WIDTH = 18
CELL_HEIGHT = 26
LEGEND_WIDTH = 460
MARGIN = 16
MEAN_WIDTH = 52
TOP = 64
NAME_WIDTH_MAX = 180
INK = "#2f81d0"  # reads on light and on dark paper


def picture(fusion: "FusionWeights", label: str, subject: str) -> str:
    """Draw an SVG file: rows of cells, a cell per layer, or one where no layer differs.

    label    of the query
    subject  names of bundle and base, which stand above
    """
    root = Element("svg", {"font-family": "sans-serif", "fill": "#808890", "role": "img"})
    root.set("xmlns", "http://www.w3.org/2000/svg")
    root.set("aria-label", "Weights, a row per adapter")
    is_layered = not reason_rows(fusion)
    n_layer = 1
    if is_layered:
        _, n_layer = fusion.weights.shape
    names = [crop(name, NAME_WIDTH_MAX, len_pixels) for name in fusion.adapters]
    name_width = max(map(len_pixels, names), default=30)
    left = MARGIN + math.ceil(name_width) + 12
    right = left + n_layer * CELL_WIDTH
    width = max(right + MEAN_WIDTH - MARGIN, LEGEND_WIDTH)
    title = crop(subject, width, len_pixels)
    _text(root, MARGIN, 28, title, size=15)
    line = crop(label, width, len_pixels)
    _text(root, MARGIN, TOP - 10, line)
    y = TOP
    for index, name in enumerate(names):
        _text(root, left - 8, y + 17, name, anchor="end")
        _draw_cells(root, left, y, fusion, index, n_layer, is_layered=is_layered)
        mean = fusion.weights[index].mean()
        _text(root, right + 10, y + 17, f"{mean:.2f}")
        y += CELL_HEIGHT
    if is_layered:
        for layer in range(0, n_layer, TICK):
            x = left + layer * CELL_WIDTH + 9
            _text(root, x, y + 14, str(layer), size=10, anchor="middle")
        _text(root, right + 10, y + 14, "mean", size=10)
    y += 40
    _draw_legend(root, y, fusion)
    _text(root, MARGIN, y + 40, facts(fusion), size=11)
    root.set("width", str(width + 2 * MARGIN))
    root.set("height", str(y + 52))
    return tostring(root, encoding="unicode") + "\n"


def _draw_cells(
    root: Element,
    x: int,
    y: int,
    fusion: "FusionWeights",
    index: int,
    n_layer: int,
    *,
    is_layered: bool,
) -> None:
    """Draw an adapter's row from a point on: the darker a cell, the more the adapter weighs."""
    low, high = scale(fusion)
    for layer in range(n_layer):
        weight = float(fusion.weights[index, layer])
        share = (weight - low) / (high - low)
        cell = _rect(root, x, y, CELL_WIDTH - 1, CELL_HEIGHT - 2)
        cell.set("class", "cell")
        _darken(cell, share)
        title = SubElement(cell, "title")
        numbers = _numbers(fusion, index, layer, is_layered)
        title.text = spelt(numbers)
        if weight < 0:
            _text(root, x + 9, y + 16, "−", anchor="middle")
        x += CELL_WIDTH


def _draw_legend(root: Element, y: int, fusion: "FusionWeights") -> None:
    low, high = scale(fusion)
    _text(root, MARGIN, y + 10, f"weight {low:g}", size=11)
    x = MARGIN + 68
    for step in range(20):
        box = _rect(root, x, y, 5, 12)
        _darken(box, step / 19)
        x += 5
    below = below_zero(fusion, "−")
    _text(root, x + 6, y + 10, f"{high:g}{below}", size=11)


def _numbers(fusion: "FusionWeights", index: int, layer: int, is_layered: bool) -> str:
    name = fusion.adapters[index]
    weight = f"weight {fusion.weights[index, layer]:.3f}"
    if not is_layered:
        return f"{name}\n{weight}"
    numbers = f"{name}, layer {layer}\n{weight}"
    if fusion.divergence is None:
        return numbers
    measured = fusion.measured
    divergence = fusion.divergence[index, layer]
    return f"{numbers}\n{measured.name} {divergence:.3g}{measured.unit}"


def _rect(parent: Element, x: int, y: int, width: int, height: int) -> Element:
    rect = SubElement(parent, "rect", fill=INK, stroke=INK)
    rect.set("x", str(x))
    rect.set("y", str(y))
    rect.set("width", str(width))
    rect.set("height", str(height))
    rect.set("stroke-opacity", "0.15")
    return rect


def _darken(rect: Element, share: float) -> None:
    """Ink a box: at 0 it is paper, at 1 all dark."""
    opacity = max(0.0, min(1.0, share))
    rect.set("fill-opacity", f"{opacity:.3f}")


def _text(
    parent: Element, x: int, y: int, content: str, *, size: int = 13, anchor: str = "start"
) -> None:
    text = SubElement(parent, "text", x=str(x), y=str(y))
    text.set("font-size", str(size))
    text.set("text-anchor", anchor)
    text.text = spelt(content)


def len_pixels(text: str) -> float:
    """About how wide a text is at 13 pixels in a sans-serif font, on the wide side."""
    from rich.cells import cell_len

    n_wide = 0
    for char in text:
        if char.isupper() or char in "mw@%—…":
            n_wide += 1
    return 7.5 * cell_len(text) + 5 * n_wide
