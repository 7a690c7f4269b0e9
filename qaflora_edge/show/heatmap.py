"""Fusion weights for a terminal: a row per adapter, a sign per layer."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qaflora_edge.show.svg import TICK, min_weight, scale
from qaflora_edge.show.text import (
    ASCII_BLOCKS,
    BLOCKS,
    can_show,
    crop,
    facts,
    visible,
    who_spoke,
    why_alone,
)

if TYPE_CHECKING:
    from typing import TextIO

    from rich.console import Console

    from qaflora_edge.weighing.numbers import FusionWeights

NAME_MAX, CELL_MAX = 20, 3  # columns


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
    ends = scale(fusions)
    for label, fusion in labelled:
        if label:
            console.print(crop(label, console.width), style="bold")
        console.print(visible(who_spoke(fusion)))
        if fusion.weights.any():
            console.print()
            _print_rows(console, fusion, ends, blocks)
        elif not label:
            console.print(why_alone(fusion))
        console.print()
    if any(fusion.weights.any() for fusion in fusions):
        console.print(_legend(fusions, ends, blocks))
    console.print(visible(facts(fusions)), style="dim")


def _print_rows(
    console: Console, fusion: FusionWeights, ends: tuple[float, float], blocks: str
) -> None:
    """Ticks, then a row of each adapter: name, mean weight, mean measure, cells."""
    from rich.table import Table
    from rich.text import Text

    n_layer = fusion.weights.shape[1]
    names = [crop(visible(name), NAME_MAX) for name in fusion.adapters]
    heads = ["mean"] + ([] if fusion.divergence is None else [fusion.measured.name])
    taken = max(map(len, names)) + sum(2 + max(5, len(head)) for head in heads) + 2
    room = max(8, console.width - taken)
    n_together = math.ceil(n_layer / room)  # layers of one cell
    n_column = min(CELL_MAX, room // math.ceil(n_layer / n_together))
    table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False, header_style="")
    table.add_column("", no_wrap=True)
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column(_ticks(n_layer, n_together, n_column), no_wrap=True)
    for index, name in enumerate(names):
        row = fusion.weights[index]
        cells = [row[at : at + n_together].mean() for at in range(0, n_layer, n_together)]
        drawn = "".join(_sign(float(cell), ends, blocks) * n_column for cell in cells)
        numbers = [f"{row.mean():.2f}"]
        if fusion.divergence is not None:
            numbers.append(f"{fusion.divergence[index].mean():.3g}")
        table.add_row(Text(name), *numbers, Text(drawn, style="cyan"))
    console.print(table)


def _sign(weight: float, ends: tuple[float, float], blocks: str) -> str:
    if weight < 0:
        return "-"
    low, high = ends
    share = (weight - low) / (high - low)
    return blocks[max(0, min(len(blocks) - 1, int(share * len(blocks) + 1e-9)))]


def _ticks(n_layer: int, n_together: int, n_column: int) -> str:
    """Numbers of layers, each above the left edge of its cell."""
    text = ""
    for layer in range(0, n_layer, TICK * n_together):
        at = layer // n_together * n_column
        text = text.ljust(at) + str(layer)
    return text if len(text) <= math.ceil(n_layer / n_together) * n_column else text.split(" ")[0]


def _legend(fusions: Sequence[FusionWeights], ends: tuple[float, float], blocks: str) -> str:
    n_layer = fusions[0].weights.shape[1]
    below = f"; - below 0, down to {lowest:.3g}" if (lowest := min_weight(fusions)) < 0 else ""
    return f"weight {ends[0]:g} {blocks} {ends[1]:g}{below}; layers 0 to {n_layer - 1}"
