"""Weights as an SVG file that stands alone, and in a notebook: nothing asks a host or runs.

The texts are in the folder assets. What a model wrote is escaped text. A cell's title has its
numbers: programs show it where one points at the cell.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup

from qaflora_edge.show import text

if TYPE_CHECKING:
    from qaflora_edge.weighing.numbers import FusionWeights

# Pixels; panel.svg.j2 has the cell's too.
CELL_WIDTH = 18
CELL_HEIGHT = 26
NAME_WIDTH_MAX = 180
MEAN_WIDTH = 52
NOTEBOOK_INK = "#2f81d0"  # reads on light and on dark paper


@dataclass(frozen=True)
class Cell:
    """One weight: its left edge, how dark it is from 0 to 1, what pointing at it tells."""

    x: int
    share: float
    title: str
    weight: float
    is_lead: bool


@dataclass(frozen=True)
class Row:
    """The weights of an adapter, the upper edge of its cells, and its mean weight as text."""

    name: str
    y: int
    mean: str
    cells: Sequence[Cell]


@dataclass(frozen=True)
class Panel:
    """Rows of cells and where they stand, in pixels; ticks are the layers with a number."""

    rows: Sequence[Row]
    ticks: Sequence[int]
    left: int
    right: int
    bottom: int
    width: int


def _render(template: str, **values: Any) -> Markup:
    """Fill a template of assets: texts are escaped, signs that command spelt; others are JSON."""

    def shown(item: object) -> object:
        if hasattr(item, "__html__"):
            return item
        written = item if isinstance(item, str) else json.dumps(item, ensure_ascii=False)
        return text.spelt(written)

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("qaflora_edge.show", "assets"),
        autoescape=True,
        finalize=shown,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    return Markup(environment.get_template(template).render(**values))


def _scale(fusions: Sequence[FusionWeights]) -> dict[str, Any]:
    """Give what the legend shows."""
    return {"ends": text.scale(fusions), "lowest": text.min_weight(fusions), "ink": NOTEBOOK_INK}


def _panel(fusion: FusionWeights, ends: tuple[float, float]) -> Panel:
    """Lay out rows of cells: a cell per layer, or one where no layer differs."""
    is_layered = not text.reason_rows(fusion)
    n_layer = fusion.weights.shape[1] if is_layered else 1
    names = [text.crop(name, NAME_WIDTH_MAX, text.len_pixels) for name in fusion.adapters]
    name_width = max(map(text.len_pixels, names), default=30)
    left = math.ceil(name_width) + 12
    right = left + n_layer * CELL_WIDTH
    leads: list[list[int]] = [[] for _ in names]
    ticks = range(0)
    if is_layered:
        leads = text.leading_layers(fusion)
        ticks = range(0, n_layer, text.TICK)
    rows = []
    for index, name in enumerate(names):
        cells = []
        for layer in range(n_layer):
            weight = float(fusion.weights[index, layer])
            share = (weight - ends[0]) / (ends[1] - ends[0])
            cell = Cell(
                x=left + layer * CELL_WIDTH,
                share=max(0.0, min(1.0, share)),
                title=_cell_title(fusion, index, layer, is_layered),
                weight=weight,
                is_lead=layer in leads[index],
            )
            cells.append(cell)
        mean = float(fusion.weights[index].mean())
        rows.append(Row(name=name, y=index * CELL_HEIGHT, mean=f"{mean:.2f}", cells=cells))
    return Panel(
        rows=rows,
        ticks=ticks,
        left=left,
        right=right,
        bottom=len(rows) * CELL_HEIGHT,
        width=right + MEAN_WIDTH,
    )


def _cell_title(fusion: FusionWeights, index: int, layer: int, is_layered: bool) -> str:
    name = fusion.adapters[index]
    weight = f"weight {float(fusion.weights[index, layer]):.3f}"
    if not is_layered:
        return f"{name}\n{weight}"
    title = f"{name}, layer {layer}\n{weight}"
    if fusion.divergence is None:
        return title
    measured = fusion.measured
    divergence = float(fusion.divergence[index, layer])
    return f"{title}\n{measured.name} {divergence:.3g}{measured.unit}"


def notebook_html(fusion: FusionWeights) -> str:
    """Show weights in a notebook: how they came about, and layers or what decided."""
    words = [text.facts([fusion])]
    if reason := text.why(fusion):
        words.append(reason)
    return _render(
        "notebook.html.j2",
        words=words,
        rows=text.reason_rows(fusion),
        panel=_panel(fusion, text.scale([fusion])),
        **_scale([fusion]),
    )


def picture(labelled: Sequence[tuple[str, FusionWeights]], subject: str) -> str:
    """Draw an SVG file that stands alone: a panel per query, all on one scale.

    labelled  a label and the weights of each query
    subject   names of bundle and base, which stand above the panels
    """
    fusions = [fusion for _, fusion in labelled]
    drawn = [_panel(fusion, text.scale(fusions)) for fusion in fusions]
    width = 460
    for panel in drawn:
        width = max(width, panel.width)
    y = 64
    panels = []
    for (label, _), panel in zip(labelled, drawn, strict=True):
        line = text.crop(label, width, text.len_pixels)
        panels.append({"label": line, "y": y, "panel": panel})
        y += panel.bottom + 56
    return _render(
        "picture.svg.j2",
        panels=panels,
        width=width + 32,
        height=y + 36,
        subject=text.crop(subject, width, text.len_pixels),
        how=text.facts(fusions),
        **_scale(fusions),
    )
