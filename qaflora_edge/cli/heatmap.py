"""Fusion weights as a heatmap for a terminal: a row per adapter, a cell per layer.

In colour a cell is a background out of one ramp, neither black nor white at its ends, so that it
reads on light and on dark; without colour it is a sign out of `BLOCKS` or `ASCII_RAMP`.
"""

import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from itertools import groupby, zip_longest
from typing import Any, Literal

import numpy as np

from qaflora_edge.cli.show import BLOCKS, can_show, layer_ranges
from qaflora_edge.show.svg_panel import (
    TICK,
    leading_layers,
    lens_and_pool,
    min_weight,
    scale,
    why_alone,
)
from qaflora_edge.weighing.numbers import FusionWeights

Colour = Literal["none", "256", "truecolor"]

ASCII_RAMP = ".:=+x*%#@"
# Viridis (CC0, by S. van der Walt and N. Smith) at ten steps: even in lightness for every eye.
RAMP = (
    *((68, 1, 84), (72, 40, 120), (62, 74, 137), (49, 104, 142), (38, 130, 142)),
    *((31, 158, 137), (53, 183, 121), (110, 206, 88), (181, 222, 43), (253, 231, 37)),
)
RAMP_256 = (53, 54, 24, 30, 36, 41, 113, 149, 190, 226)  # of the same kind, by number
NAME_MAX, CELL_MAX, MEAN = 20, 3, 4  # columns
TITLE_LINES = 3  # of a prompt
GAP = 2
TABLE_MIN = 60  # columns below which adapters' lines are not set as a table


def terminal_colour(stream: Any, environ: Mapping[str, str] = os.environ) -> Colour:
    """Tell which colours a stream may be written with.

    NO_COLOR forbids them and FORCE_COLOR allows them off a terminal. A terminal that does not say
    that it has 256 colours gets none: 16 are no ramp.
    """
    term = environ.get("TERM", "")
    if environ.get("NO_COLOR") or term == "dumb":
        return "none"
    if not stream.isatty() and not environ.get("FORCE_COLOR"):
        return "none"
    depth = environ.get("COLORTERM", "").lower()
    if depth in ("truecolor", "24bit") or "direct" in term or "WT_SESSION" in environ:
        return "truecolor"
    return "256" if "256color" in term or environ.get("FORCE_COLOR") else "none"


def heatmap(
    fusion: FusionWeights, *, width: int, encoding: str | None, colour: Colour = "none"
) -> str:
    """The weights of one query as lines of at most `width` columns.

    Layers that do not fit beside each other go on in a further band below. With 20 columns or
    more every line fits; names go on in a further line where they have to.
    """
    pen = Pen([fusion], encoding, colour)
    lines = [pen.wrap(_facts(fusion, pen), width), ""]
    if not fusion.weights.any():
        return "\n".join([*lines, pen.wrap(why_alone(fusion), width)])
    lines += _bands(fusion, pen, width)
    lines += ["", *_leads(fusion, pen, width), "", pen.legend(fusion.weights.shape[1], width)]
    return "\n".join(lines)


def compare(
    labelled: Sequence[tuple[str, FusionWeights]],
    *,
    width: int,
    encoding: str | None,
    colour: Colour = "none",
) -> str:
    """The weights of several queries of one bundle, side by side where the width allows it.

    labelled  a label and the weights of each query; all weights are drawn on one scale
    """
    fusions = [fusion for _, fusion in labelled]
    pen = Pen(fusions, encoding, colour)
    first = fusions[0]
    lines = [pen.wrap(_facts(first, pen, is_shared=True), width), ""]
    if not any(fusion.weights.any() for fusion in fusions):
        return "\n".join([*lines, pen.wrap(why_alone(first), width)])
    titles = [f"{number} {label}" for number, (label, _) in enumerate(labelled, 1)]
    n_layer = first.weights.shape[1]
    names = pen.names(first.adapters, width)
    room = width - len_columns(names[0][0])
    n_beside = min(len(fusions), room // (GAP + MEAN + GAP + n_layer))
    if n_beside < 2:
        for title, fusion in zip(titles, fusions, strict=True):
            lines += [*map(str.rstrip, pen.title(title, width)), *_bands(fusion, pen, width), ""]
    else:
        cell = min(CELL_MAX, (room // n_beside - GAP - MEAN - GAP) // n_layer)
        for at in range(0, len(fusions), n_beside):
            row = slice(at, at + n_beside)
            lines += _beside(titles[row], fusions[row], pen, names, cell)
            lines.append("")
    lines.append(pen.wrap("The adapter that weighs most, and at which layers:", width))
    lines += [
        pen.wrap(f"{number} {_leads_in_words(fusion, pen)}", width, indent=len(f"{number} "))
        for number, fusion in enumerate(fusions, 1)
    ]
    return "\n".join([*lines, "", pen.legend(n_layer, width)])


def ramp_colour(share: float) -> tuple[int, int, int]:
    """RGB at a share of the scale, 0 to 1."""
    at = share * (len(RAMP) - 1)
    red, green, blue = (
        round(np.interp(at, range(len(RAMP)), part)) for part in zip(*RAMP, strict=True)
    )
    return red, green, blue


def len_columns(text: str) -> int:
    """Columns that a text takes on a terminal."""
    from rich.cells import cell_len

    return cell_len(text)


class Pen:
    """Draws on one terminal, with one scale for all weights it is given."""

    def __init__(
        self, fusions: Sequence[FusionWeights], encoding: str | None, colour: Colour
    ) -> None:
        self._encoding = encoding if encoding and can_show("", encoding) else "ascii"
        self._colour = colour
        self._signs = BLOCKS if can_show(BLOCKS, encoding) else ASCII_RAMP
        self._low, self._high = scale(fusions)
        self._lowest = min_weight(fusions)
        self.dot = self.sign("·", "-")

    def sign(self, text: str, instead: str) -> str:
        """A sign, or another where the encoding lacks it."""
        return text if can_show(text, self._encoding) else instead

    def plain(self, text: str) -> str:
        """A text on one line without control characters, in what the encoding has."""
        shown = "".join(c if c.isprintable() else " " for c in text)
        shown = shown.encode(self._encoding, "replace").decode(self._encoding)
        return " ".join(shown.split())

    def fold(self, text: str, width: int) -> list[str]:
        """A text as lines of exactly `width` columns, broken where one is full."""
        from rich.cells import chop_cells, set_cell_size

        return [set_cell_size(line, width) for line in chop_cells(self.plain(text), width) or [""]]

    def title(self, text: str, width: int) -> list[str]:
        """A prompt in a few lines of exactly `width` columns, cut with a sign if it is longer."""
        from rich.cells import set_cell_size

        wrapped = self.wrap(text, width).split("\n")
        lines = [set_cell_size(line, width) for line in wrapped[:TITLE_LINES]]
        if len(wrapped) > TITLE_LINES:
            mark = self.sign("…", "~")
            lines[-1] = set_cell_size(set_cell_size(lines[-1], width - 1).rstrip() + mark, width)
        return lines

    def names(self, names: Sequence[str], width: int) -> list[list[str]]:
        """The lines of each name, all in one column of at most a quarter of the width."""
        longest = max(len_columns(self.plain(name)) for name in names)
        columns = min(longest, NAME_MAX, max(4, width // 4))
        return [self.fold(name, columns) for name in names]

    def wrap(self, text: str, width: int, *, indent: int = 0) -> str:
        """A text in lines of at most `width` columns, all but the first with an indent.

        textwrap counts characters, and some take two columns.
        """
        from rich.cells import chop_cells

        lines = [""]
        for word in self.plain(text).split(" "):
            line = f"{lines[-1]} {word}" if lines[-1].strip() else lines[-1] + word
            if len_columns(line) <= width:
                lines[-1] = line
                continue
            if lines[-1].strip():
                lines.append(" " * indent)
            first, *rest = chop_cells(word, max(2, width - indent))
            lines[-1] += first
            lines += [" " * indent + part for part in rest]
        return "\n".join(lines)

    def cells(self, weights: Sequence[float], cell: int) -> str:
        """One cell of `cell` columns per weight."""
        if self._colour == "none":
            return "".join(self._sign_of(weight) * cell for weight in weights)
        drawn = [(self._paint(w), "-" * cell if w < 0 else " " * cell) for w in weights]
        return "".join(
            f"\x1b[{paint}m{''.join(text for _, text in run)}\x1b[0m"
            for paint, run in groupby(drawn, key=lambda item: item[0])
        )

    def _sign_of(self, weight: float) -> str:
        if weight < 0:
            return "-"
        return self._signs[
            min(len(self._signs) - 1, int(self._share(weight) * len(self._signs) + 1e-9))
        ]

    def _share(self, weight: float) -> float:
        return max(0.0, (weight - self._low) / (self._high - self._low))

    def _paint(self, weight: float) -> str:
        share = self._share(weight)
        if self._colour == "truecolor":
            return "97;48;2;{};{};{}".format(*ramp_colour(share))
        return f"97;48;5;{RAMP_256[min(len(RAMP_256) - 1, int(share * len(RAMP_256)))]}"

    def legend(self, n_layer: int, width: int) -> str:
        """What the cells mean."""
        steps = {"none": len(self._signs), "256": len(RAMP_256), "truecolor": 16}
        n_step = max(2, min(steps[self._colour], width - len("weight 0.1  0.2")))
        share = n_step - 1 if self._colour == "truecolor" else n_step
        span = self._high - self._low
        ramp = self.cells([self._low + span * step / share for step in range(n_step)], 1)
        lines = [f"weight {self._low:g} {ramp} {self._high:g}"]
        if self._lowest < 0:
            lines.append(self.wrap(f"-  below 0 (the lowest is {self._lowest:.3g})", width))
        text = f"a column is a layer, 0 to {n_layer - 1}"
        return "\n".join([*lines, self.wrap(text, width)])


def _facts(fusion: FusionWeights, pen: Pen, *, is_shared: bool = False) -> str:
    """How the weights came about; `is_shared` leaves out what differs between queries."""
    parts = [f"strategy {fusion.strategy}"]
    if read := lens_and_pool(fusion):
        parts.append(read)
    if not is_shared:
        parts.append(f"{fusion.prompt_tokens} prompt tokens")
        if fusion.divergence is not None:
            parts.append(f"probe {fusion.probe_ms:.0f} ms")
    return f" {pen.dot} ".join(parts)


def _bands(fusion: FusionWeights, pen: Pen, width: int) -> list[str]:
    """The cells of one query with ticks, names and means, in as few bands as fit."""
    n_layer = fusion.weights.shape[1]
    names = pen.names(fusion.adapters, width)
    left = len_columns(names[0][0]) + GAP + MEAN + GAP
    room = max(1, width - left)
    n_band = math.ceil(n_layer / room)
    n_beside = math.ceil(n_layer / n_band)
    rounded = math.ceil(n_beside / TICK) * TICK
    if n_band > 1 and rounded <= room:
        n_beside = rounded
    cell = min(CELL_MAX, room // n_beside)
    lines: list[str] = []
    for start in range(0, n_layer, n_beside):
        layers = range(start, min(n_layer, start + n_beside))
        head = "mean" if start == 0 else " " * MEAN
        lines.append(f"{' ' * (left - MEAN - 2 * GAP)}  {head}  {_ticks(layers, cell)}".rstrip())
        for (name, *rest), row in zip(names, fusion.weights, strict=True):
            mean = _mean(row) if start == 0 else " " * MEAN
            drawn = pen.cells(row[layers.start : layers.stop].tolist(), cell)
            lines += [f"{name}  {mean}  {drawn}", *map(str.rstrip, rest)]
    return lines


def _beside(
    titles: Sequence[str],
    fusions: Sequence[FusionWeights],
    pen: Pen,
    names: Sequence[list[str]],
    cell: int,
) -> list[str]:
    """Several queries in one row of panels: titles, ticks, then the lines of each adapter."""
    n_layer = fusions[0].weights.shape[1]
    columns = MEAN + GAP + n_layer * cell
    margin, gap = " " * len_columns(names[0][0]), " " * GAP
    ticks = f"mean{gap}{_ticks(range(n_layer), cell)}".ljust(columns)
    heads = zip_longest(*(pen.title(title, columns) for title in titles), fillvalue=" " * columns)
    lines = [(margin + "".join(gap + part for part in head)).rstrip() for head in heads]
    lines.append((margin + (gap + ticks) * len(fusions)).rstrip())
    for index, (name, *rest) in enumerate(names):
        rows = [fusion.weights[index] for fusion in fusions]
        panels = [f"{_mean(row)}{gap}{pen.cells(row.tolist(), cell)}" for row in rows]
        lines += [name + "".join(gap + panel for panel in panels), *map(str.rstrip, rest)]
    return lines


def _mean(row: Any) -> str:
    """The mean of an adapter's weights [n_layer] in `MEAN` columns, with what digits fit."""
    mean = float(row.mean())
    for n_digit in (2, 1, 0):
        if len(text := f"{mean:.{n_digit}f}") <= MEAN:
            return text.rjust(MEAN)
    return ">999" if mean > 0 else "<-99"


def _ticks(layers: range, cell: int) -> str:
    """Numbers of every fifth layer, each above the left edge of its cells."""
    text = ""
    for layer in layers:
        at = (layer - layers.start) * cell
        is_tick = layer % TICK == 0 or layer == layers.start
        if is_tick and (not text or at > len(text)):
            text = text.ljust(at) + str(layer)
    limit = len(layers) * cell
    return text if len(text) <= limit else text[: text.rfind(" ") + 1].rstrip()


def _leads(fusion: FusionWeights, pen: Pen, width: int) -> list[str]:
    """For each adapter the mean of what was measured, and the layers at which it weighs most."""
    dash = pen.sign("–", "-")
    ranges = [layer_ranges(layers, dash) for layers in leading_layers(fusion)]
    means: list[str] = []
    head = ""
    if fusion.divergence is not None:
        head = f"  {fusion.measured.name}"
        means = [f"{float(row.mean()):.3g}" for row in fusion.divergence]
    if width < TABLE_MIN:
        return _leads_narrow(fusion, ranges, means, pen, width)
    names = pen.names(fusion.adapters, width)
    blank, columns = " " * len_columns(names[0][0]), len(head)
    lines = [f"{blank}{head}  weighs most at layers"]
    for name, mean, text in zip_longest(names, means, ranges, fillvalue=""):
        parts = textwrap.wrap(text, width - len(blank) - columns - GAP)
        for index, (left, part) in enumerate(zip_longest(name, parts)):
            middle = mean if index == 0 else ""
            lines.append(f"{left or blank}{middle:>{columns}}  {part or ''}".rstrip())
    return lines


def _leads_narrow(
    fusion: FusionWeights, ranges: Sequence[str], means: Sequence[str], pen: Pen, width: int
) -> list[str]:
    names = fusion.adapters
    lines = [pen.wrap("weighs most at layers", width)]
    lines += [pen.wrap(f"{n}: {r}", width, indent=2) for n, r in zip(names, ranges, strict=True)]
    if means:
        lines += ["", pen.wrap(f"mean {fusion.measured.name}", width)]
        lines += [pen.wrap(f"{n}: {m}", width, indent=2) for n, m in zip(names, means, strict=True)]
    return lines


def _leads_in_words(fusion: FusionWeights, pen: Pen) -> str:
    if not fusion.weights.any():
        return "none: the base answers alone"
    dash = pen.sign("–", "-")
    parts = [
        f"{name} {layer_ranges(layers, dash)}"
        for name, layers in zip(fusion.adapters, leading_layers(fusion), strict=True)
        if layers
    ]
    return "; ".join(parts) or "none: the largest weights are equal at every layer"
