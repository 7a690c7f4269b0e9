"""Lines at the bottom of a terminal that may still change, below lines that never will."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from typing import IO

from rich.cells import cell_len
from wcwidth import wcwidth

_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class LiveLines:
    """Writes lines for good, and redraws the last ones where they stand.

    The terminal's own scrolling is used: what is written for good is never touched again, and
    what may change is never taller than the screen, so that all of it can be reached.

    size  gives (columns, rows) of the terminal as it is now
    """

    def __init__(self, file: IO[str], size: Callable[[], tuple[int, int]]) -> None:
        self._file, self._size = file, size
        self._drawn: list[str] = []

    def update(self, for_good: Sequence[str], live: Sequence[str]) -> None:
        """Put lines in place of the live ones: some for good, and the live ones below them.

        Both are lines without line ends; of live lines the last ones that fit are shown.
        """
        columns, n_row = self._size()
        live = [_cropped(line, columns) for line in live[-max(1, n_row - 2) :]]
        lines = [*for_good, *live]
        n_same = 0
        for old, new in zip(self._drawn, lines, strict=False):
            if old != new:
                break
            n_same += 1
        if live and n_same == len(lines) < len(self._drawn):
            n_same -= 1  # erasing below it is not enough: the cursor is to end behind it
        rest = lines[n_same:]
        out = ""
        if n_same < len(self._drawn):
            out = self._up_to(n_same, columns)
        elif self._drawn and (rest or not live):
            out = "\n"
        out += "\n".join(rest)
        if rest and not live:
            out += "\n"
        self._drawn = live
        if out:
            self._file.write(out)
            self._file.flush()

    def _up_to(self, index: int, columns: int) -> str:
        """Escapes that bring the cursor to the beginning of a drawn line and erase what follows."""
        n_up = sum(_n_row(line, columns) for line in self._drawn[index:]) - 1
        return "\r" + (f"\x1b[{n_up}A" if n_up else "") + "\x1b[J"


def _cropped(line: str, columns: int) -> str:
    """A line that takes one row on every terminal.

    Some draw the parts of an emoji side by side. What is cut here is whole once it is for good.
    """
    text = _ESCAPE.sub("", line)
    columns_at = list(itertools.accumulate(max(0, wcwidth(char)) for char in text))
    if not text or columns_at[-1] <= columns:
        return line
    return text[: sum(column <= columns for column in columns_at)]


def _n_row(line: str, columns: int) -> int:
    """Rows that a line takes; a terminal that became narrower has wrapped it."""
    return max(1, -(-cell_len(_ESCAPE.sub("", line)) // max(1, columns)))
