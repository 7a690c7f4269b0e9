"""Fusion weights in words, what a terminal can show, and text that may not reach it as it is."""

from __future__ import annotations

import contextlib
import os
from itertools import groupby
from typing import TYPE_CHECKING, TextIO

import click

if TYPE_CHECKING:
    from qaflora_edge.weighing.numbers import FusionWeights

BLOCKS = "▁▂▃▄▅▆▇█"


def can_show(text: str, encoding: str | None) -> bool:
    """Tell whether an encoding has every sign of a text."""
    try:
        text.encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def mean_weights(fusion: FusionWeights) -> dict[str, float]:
    """Adapter -> mean weight over layers."""
    means = fusion.weights.mean(axis=1)
    return {name: float(mean) for name, mean in zip(fusion.adapters, means, strict=True)}


def mix_line(fusion: FusionWeights) -> str:
    """The mean weights in one line, such as `math 0.52, es 0.26`."""
    if not fusion.weights.any():
        return "the base alone"
    return ", ".join(f"{name} {mean:.2f}" for name, mean in mean_weights(fusion).items())


def layer_ranges(layers: list[int], dash: str) -> str:
    """Layers in ascending order as text, such as `0–3, 7`; `none` without any."""
    by_run = groupby(enumerate(layers), lambda item: item[1] - item[0])
    runs = [[layer for _, layer in run] for _, run in by_run]
    shown = (dash.join(dict.fromkeys((str(run[0]), str(run[-1])))) for run in runs)
    return ", ".join(shown) or "none"


def paint(text: str, colour: str) -> str:
    """Colour a text, unless NO_COLOR asks for none; click drops colour off a terminal."""
    return text if os.environ.get("NO_COLOR") else click.style(text, fg=colour)


def terminal_size(stream: TextIO) -> tuple[int, int]:
    """(columns, rows) of the terminal a stream leads to; 80 and 24 where there is none.

    The terminal itself is asked: COLUMNS may be that of another one.
    """
    with contextlib.suppress(OSError, ValueError):  # ValueError: a stream without a file
        columns, rows = os.get_terminal_size(stream.fileno())
        if columns > 0 and rows > 0:
            return columns, rows
    return 80, 24


# What we and Markdown's rendering draw with -> what stands for it in ASCII.
_ASCII = str.maketrans(
    {
        **dict.fromkeys("─━╌═", "-"),
        **dict.fromkeys("│┃║▌▏", "|"),
        **dict.fromkeys("┌┐└┘├┤┬┴┼┏┓┗┛┡┩╇╈╞╡╪┳╋", "+"),
        "•": "*",
        "·": "-",
        "…": "...",
        "›": ">",
    }
)
_SAMPLE = "─│┼•·…"
_KEPT = "\n\t"


def has_signs(encoding: str | None) -> bool:
    """Whether an encoding has the signs we draw with."""
    return can_show(_SAMPLE, encoding)


def to_ascii(text: str) -> str:
    """The signs we draw with in ASCII; other text stays."""
    return text.translate(_ASCII)


def visible(text: str, *, has_signs: bool) -> str:
    """Text without control characters: an answer moves no cursor and changes no colour.

    Line ends and tabs stay; carriage returns go; other control characters are shown as signs.
    """
    return text.translate(_PICTURES if has_signs else _MARKS)


_CONTROLS = [code for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in _KEPT]
_MARKS: dict[int, str | None] = {code: "?" for code in _CONTROLS} | {ord("\r"): None}
_PICTURES: dict[int, str | None] = {
    **{code: chr(0x2400 + code) if code < 0x20 else "\N{REPLACEMENT CHARACTER}" for code in _MARKS},
    0x7F: "\N{SYMBOL FOR DELETE}",
    ord("\r"): None,
}
