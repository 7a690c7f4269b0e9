"""What a terminal can show."""

from __future__ import annotations

import contextlib
import os
from typing import TextIO

import click

from qaflora_edge.show.text import can_show


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


def has_signs(encoding: str | None) -> bool:
    """Whether an encoding has the signs we draw with."""
    return can_show(_SAMPLE, encoding)


def to_ascii(text: str) -> str:
    """The signs we draw with in ASCII; other text stays."""
    return text.translate(_ASCII)
