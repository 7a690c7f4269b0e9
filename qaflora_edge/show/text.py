"""Text made safe for a terminal, a page or a picture, and fusion weights in words."""

from __future__ import annotations

import unicodedata
from bisect import bisect
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby, zip_longest
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qaflora_edge.weighing.numbers import FusionWeights

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

    As in `math 50 % · es 50 %`, `es 81 % · base 19 %`, or `base`.
    """
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
    found = "No adapter weighs anything" if fusion.adapters else "There are no adapters"
    return f"{found}: the base answers alone."


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
        parts += [f"{each} {getattr(first, each)}" for each in first.measured.reads]
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
