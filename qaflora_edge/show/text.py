"""Text made safe for a terminal, a page or a picture; weights in words and as a heatmap."""

from __future__ import annotations

import math
import sys
import unicodedata
from bisect import bisect
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby, zip_longest
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import TextIO

    from rich.table import Table

    from qaflora_edge.weighing.numbers import FusionWeights

BLOCKS, ASCII_BLOCKS = "▁▂▃▄▅▆▇█", ".:=+x*#@"
EQUAL = 1e-6  # weights are shares in float32: closer ones are one weight
TICK = 5  # a label at every fifth layer
NAME_MAX, CELL_MAX = 20, 3  # columns of a terminal
CHARS_MAX = 2000  # of a label that are looked at: no picture has room for more
# They turn the direction of what follows: "\u202etxt.exe" would read as "exe.txt".
_TURNING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


# terminals


def can_show(text: str, encoding: str | None) -> bool:
    """Tell whether an encoding has every sign of a text."""
    try:
        text.encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


_CONTROLS = (*range(0x20), *range(0x7F, 0xA0))
_VISIBLE = {code: "?" for code in _CONTROLS if chr(code) not in "\n\t\r"} | {ord("\r"): ""}


def visible(text: str) -> str:
    """Write control characters as `?`: an answer moves no cursor and changes no colour.

    Line ends and tabs stay; carriage returns go.
    """
    return text.translate(_VISIBLE)


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lay out rows as lines: the first column to the left, others to the right."""
    widths = [max(map(len, column)) for column in zip_longest(*rows, fillvalue="")]
    return [
        "   ".join(
            f"{cell:{'>' if index else '<'}{width}}"
            for index, (cell, width) in enumerate(zip(row, widths, strict=False))
        ).rstrip()
        for row in rows
    ]


# pages and pictures


def spelt(text: str) -> str:
    """Spell control characters, and those that turn a text's direction, as escapes.

    Tabs and line ends stay; so do marks inside words, such as the joiners of emoji. Surrogates and
    U+FFFE are no text, and XML has no way to write them.
    """

    def is_spelt(char: str) -> bool:
        is_control = char not in "\t\n" and unicodedata.category(char) in ("Cc", "Cs")
        return is_control or char in _TURNING or ord(char) & 0xFFFE == 0xFFFE

    if text.isprintable():  # quick: nothing of it is in most texts
        return text
    return "".join(ascii(char)[1:-1] if is_spelt(char) else char for char in text)


def crop(text: str, width: float, measure: Callable[[str], float] = len) -> str:
    """Put a text on one line, and cut it with a sign where it is wider than `width`.

    measure  the width of a text; it may not shrink when the text grows
    """
    text = spelt(" ".join(text[: 2 * CHARS_MAX].split()))[:CHARS_MAX]
    if measure(text) <= width:
        return text
    ends = range(1, len(text) + 1)
    n_char = bisect(ends, False, key=lambda n: measure(f"{text[:n]}…") > width)
    return f"{text[:n_char].rstrip()}…"


def len_pixels(text: str) -> float:
    """About how wide a text is at 13 pixels in a sans-serif font, on the wide side."""
    from rich.cells import cell_len

    n_wide = sum(char.isupper() or char in "mw@%—…" for char in text)
    return 7.5 * cell_len(text) + 5 * n_wide


# weights in words


def who_spoke(weights: FusionWeights | Mapping[str, float]) -> str:
    """Name the adapters that weigh anything, heaviest first, and the base's share.

    weights  of a query, or the mean over layers by adapter

    As in `math 50 % · es 50 %`, `es 81 % · base 19 %`, or `base`; of a relay `company → json`.
    """
    if not isinstance(weights, Mapping) and weights.relay is not None:
        return f"{spelt(weights.relay.knower)} → {spelt(weights.relay.writer)}"
    by_name = weights if isinstance(weights, Mapping) else weights.means
    means = sorted(by_name.items(), key=lambda item: -item[1])
    shares = {spelt(name): round(100 * mean) for name, mean in means}
    rest = 100 - sum(shares.values())
    parts = [f"{name} {share} %" for name, share in shares.items() if share]
    if not parts:
        return "base"
    return " · ".join(parts + [f"base {rest} %"] * (rest > 1))


def why(fusion: FusionWeights) -> str:
    """Say what decided, or that the base answers alone; "" where layers show it."""
    if fusion.because or fusion.weights.any():
        return fusion.because
    cause = "No adapter weighs anything" if fusion.adapters else "There are no adapters"
    return f"{cause}: the base answers alone."


def reason_rows(fusion: FusionWeights) -> list[list[str]]:
    """Lay out what decided where no layer differs: heads, adapters, thresholds; else nothing."""
    reasons = list(fusion.why.values())
    is_measured = fusion.divergence is not None and not reasons
    if is_measured or (fusion.weights != fusion.weights[:, :1]).any():
        return []
    columns = {"adapter": fusion.adapters, "weight": [f"{w:.2f}" for w in fusion.means.values()]}
    places, needed = (reasons[0].scores, reasons[0].thresholds) if reasons else ({}, {})
    digits = ".2f" if needed else ".3g"
    for place in places:
        columns[place] = [f"{reason.scores[place]:{digits}}" for reason in reasons]
    if any(reason.taken_as for reason in reasons):
        columns["taken as"] = [reason.taken_as or "-" for reason in reasons]
    rows = [[*columns], *map(list, zip(*columns.values(), strict=True))]
    if needed:
        shown = [f"{needed[place]:.2f}" if place in needed else "" for place in places]
        rows.append(["threshold", "", *shown])
    return rows


def facts(fusions: Sequence[FusionWeights]) -> str:
    """Say how weights came about, in what all of them share."""
    first = fusions[0]
    parts = [f"strategy {first.strategy}"]
    if first.divergence is not None:
        parts += [f"{option} {getattr(first, option)}" for option in first.measured.reads]
    if len(fusions) == 1:
        parts.append(f"{first.prompt_tokens} prompt tokens")
        parts += [f"probe {first.probe_ms:.0f} ms"] * (first.probe_ms > 0)
    return ", ".join(parts)


def layer_ranges(layers: Sequence[int]) -> str:
    """Write layers in ascending order, such as `0–3, 7`; `none` without any."""
    by_run = groupby(enumerate(layers), lambda item: item[1] - item[0])
    runs = [[layer for _, layer in run] for _, run in by_run]
    shown = ("–".join(dict.fromkeys((str(run[0]), str(run[-1])))) for run in runs)
    return ", ".join(shown) or "none"


# weights as a heatmap: its scale, and a row per adapter for a terminal


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
        if reason := why(fusion):
            console.print(visible(reason))
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
        shares = [(cell - ends[0]) / (ends[1] - ends[0]) * len(blocks) for cell in cells]
        signs = [blocks[max(0, min(len(blocks) - 1, int(share + 1e-9)))] for share in shares]
        pairs = zip(cells, signs, strict=True)
        drawn = "".join(("-" if cell < 0 else sign) * n_column for cell, sign in pairs)
        numbers = [f"{row.mean():.2f}"]
        if fusion.divergence is not None:
            numbers.append(f"{fusion.divergence[index].mean():.3g}")
        table.add_row(Text(name), *numbers, Text(drawn, style="cyan"))
    return table


def _ticks(n_layer: int, n_together: int, n_column: int) -> str:
    """Number the layers, each above the left edge of its cell."""
    text = ""
    for layer in range(0, n_layer, TICK * n_together):
        text = text.ljust(layer // n_together * n_column) + str(layer)
    return text if len(text) <= math.ceil(n_layer / n_together) * n_column else text.split(" ")[0]
