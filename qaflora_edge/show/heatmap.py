"""Fusion weights as a heatmap: its scale, and a row per adapter for a terminal."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qaflora_edge.show.text import (
    can_show,
    columns,
    crop,
    facts,
    reason_rows,
    visible,
    who_spoke,
    why,
)

if TYPE_CHECKING:
    from typing import TextIO

    from rich.table import Table

    from qaflora_edge.weighing.numbers import FusionWeights

BLOCKS, ASCII_BLOCKS = "▁▂▃▄▅▆▇█", ".:=+x*#@"
EQUAL = 1e-6  # weights are shares in float32: closer ones are one weight
TICK = 5  # a label at every fifth layer
NAME_MAX, CELL_MAX = 20, 3  # columns of a terminal


def scale(fusions: Sequence[FusionWeights]) -> tuple[float, float]:
    """Find the ends of the scale: the lowest weight rounded down, the largest rounded up.

    Both are tenths up to 1, then whole numbers; the first is not below 0. Eight adapters share a
    sum of 1, and on a scale from 0 to 1 all of them would look alike.
    """
    largest = max((float(f.weights.max()) for f in fusions if f.weights.size), default=1.0)
    if largest <= 0.0:
        return 0.0, 1.0
    step = 10 if largest < 1.0 else 1
    high = math.ceil((largest - EQUAL) * step) / step or 1 / step
    low = max(0.0, math.floor((min_weight(fusions) + EQUAL) * step) / step)
    return (low if low < high else 0.0), high


def min_weight(fusions: Sequence[FusionWeights]) -> float:
    """Find the lowest weight of all queries."""
    return min((float(f.weights.min()) for f in fusions if f.weights.size), default=0.0)


def leading_layers(fusion: FusionWeights) -> list[list[int]]:
    """List the layers at which each adapter weighs more than every other: a list per adapter.

    Weights that differ by less than 1e-6 count as equal, and then no adapter leads the layer.
    """
    leads: list[list[int]] = [[] for _ in fusion.adapters]
    for layer, column in enumerate(fusion.weights.T.tolist()):
        largest = max(column, default=0.0)
        near = [index for index, weight in enumerate(column) if largest - weight < EQUAL]
        if len(near) == 1 and largest > 0:
            leads[near[0]].append(layer)
    return leads


def print_heatmap(
    labelled: Sequence[tuple[str, FusionWeights]],
    stream: TextIO | None = None,
    *,
    is_plain: bool = False,
) -> None:
    """Print the weights of each query to a terminal or a pipe, all on one scale.

    labelled  a label, which may be empty, and the weights of each query
    is_plain  write no escape codes; else rich decides, by the terminal, NO_COLOR and FORCE_COLOR
    """
    from rich.console import Console

    stream = stream or sys.stdout
    is_terminal = False if is_plain else None
    console = Console(file=stream, highlight=False, markup=False, force_terminal=is_terminal)
    blocks = BLOCKS if can_show(BLOCKS + "·", stream.encoding) else ASCII_BLOCKS
    fusions = [fusion for _, fusion in labelled]
    low, high = scale(fusions)
    for label, fusion in labelled:
        if label:
            console.print(crop(label, console.width), style="bold")
        console.print(visible(who_spoke(fusion)))
        if told := why(fusion):
            console.print(visible(told))
        if fusion.weights.any() or fusion.why:
            console.print()
            table = [[crop(visible(name), NAME_MAX), *row] for name, *row in reason_rows(fusion)]
            layers = None if table else _rows(fusion, (low, high), blocks, console.width)
            console.print(layers or "\n".join(columns(table)))
        console.print()
    if any(not reason_rows(fusion) for fusion in fusions):
        lowest, n_layer = min_weight(fusions), fusions[0].weights.shape[1]
        below = f"; - below 0, down to {lowest:.3g}" if lowest < 0 else ""
        console.print(f"weight {low:g} {blocks} {high:g}{below}; layers 0 to {n_layer - 1}")
    console.print(visible(facts(fusions)), style="dim")


def _rows(fusion: FusionWeights, ends: tuple[float, float], blocks: str, width: int) -> Table:
    """Lay out ticks, then a row of each adapter: name, mean weight, mean measure, cells."""
    from rich.table import Table
    from rich.text import Text

    n_layer = fusion.weights.shape[1]
    names = [crop(visible(name), NAME_MAX) for name in fusion.adapters]
    heads = ["mean"] + ([] if fusion.divergence is None else [fusion.measured.name])
    room = max(8, width - max(map(len, names)) - sum(2 + max(5, len(head)) for head in heads) - 2)
    n_together = math.ceil(n_layer / room)  # layers of one cell
    n_column = min(CELL_MAX, room // math.ceil(n_layer / n_together))
    table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False, header_style="")
    table.add_column("", no_wrap=True)
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column(_ticks(n_layer, n_together, n_column), no_wrap=True)
    for index, name in enumerate(names):
        row = fusion.weights[index]
        cells = [float(row[at : at + n_together].mean()) for at in range(0, n_layer, n_together)]
        drawn = "".join(_sign(cell, ends, blocks) * n_column for cell in cells)
        numbers = [f"{row.mean():.2f}"]
        if fusion.divergence is not None:
            numbers.append(f"{fusion.divergence[index].mean():.3g}")
        table.add_row(Text(name), *numbers, Text(drawn, style="cyan"))
    return table


def _sign(weight: float, ends: tuple[float, float], blocks: str) -> str:
    share = (weight - ends[0]) / (ends[1] - ends[0])
    at = max(0, min(len(blocks) - 1, int(share * len(blocks) + 1e-9)))
    return "-" if weight < 0 else blocks[at]


def _ticks(n_layer: int, n_together: int, n_column: int) -> str:
    """Number the layers, each above the left edge of its cell."""
    text = ""
    for layer in range(0, n_layer, TICK * n_together):
        text = text.ljust(layer // n_together * n_column) + str(layer)
    return text if len(text) <= math.ceil(n_layer / n_together) * n_column else text.split(" ")[0]
