"""A small terminal for the tests: what a stream of text and escapes leaves on a screen.

It knows what our output uses, and fails on everything else.
"""

import re
from typing import Any

from rich.console import Console
from wcwidth import wcwidth

from qaflora_edge.cli.chat.markdown import THEME
from qaflora_edge.cli.chat.stream import MarkdownStream

_PART = re.compile(
    r"\x1b\[(?P<number>\d*)(?P<kind>[AJ])|\x1b\[[\d;]*m|(?P<char>[^\x1b])", re.DOTALL
)


class Screen:
    """Rows of cells that scroll; `rows` has what scrolled out as well."""

    def __init__(self, columns: int, height: int) -> None:
        self.columns, self.height = columns, height
        self.rows: list[list[str]] = [[]]
        self._row, self._column = 0, 0
        self._written = 0

    @property
    def top(self) -> int:
        return max(0, len(self.rows) - self.height)

    @property
    def lines(self) -> list[str]:
        """All rows as text, without blanks at their ends."""
        return ["".join(row).rstrip() for row in self.rows]

    def write(self, text: str) -> None:
        at = 0
        while at < len(text):
            part = _PART.match(text, at)
            assert part, f"the screen does not know {text[at : at + 20]!r}"
            at = part.end()
            if part["kind"] == "A":
                self._row = max(self.top, self._row - int(part["number"] or 1))
                self._column = min(self._column, self.columns - 1)
            elif part["kind"] == "J":
                assert part["number"] in ("", "0")
                self.rows[self._row] = self.rows[self._row][: self._column]
                for row in range(self._row + 1, len(self.rows)):
                    self.rows[row] = []
            elif part["char"] is not None:
                self._put(part["char"])

    def flush(self) -> None:
        """As a file has it."""

    def _put(self, char: str) -> None:
        if char == "\r":
            self._column = 0
        elif char == "\n":
            self._next_row()
        else:
            width = wcwidth(char)
            assert width >= 0, f"a control character: {char!r}"
            if self._column + width > self.columns:
                self._next_row()
            row = self.rows[self._row]
            row.extend(" " * (self._column - len(row)))
            # A wide character takes a second cell, which is empty here.
            row[self._column : self._column + width] = [char, *[""] * (width - 1)]
            self._column += width

    def _next_row(self) -> None:
        self._row, self._column = self._row + 1, 0
        if self._row == len(self.rows):
            self.rows.append([])


def console_on(screen: Screen) -> Console:
    return Console(
        file=screen,  # type: ignore[arg-type]
        theme=THEME,
        force_terminal=True,
        width=screen.columns,
        height=screen.height,
        legacy_windows=False,
        highlight=False,
    )


def stream_on(screen: Screen, *, ascii_only: bool = False, **options: Any) -> MarkdownStream:
    return MarkdownStream(
        console_on(screen),
        size=lambda: (screen.columns, screen.height),
        ascii_only=ascii_only,
        **options,
    )


def whole(text: str, columns: int) -> list[str]:
    """The rows of an answer that came in one piece on a screen without end, and of a prompt."""
    screen = Screen(columns, 10**6)
    stream = stream_on(screen)
    stream.feed(text)
    stream.finish()
    screen.write("> ")
    return screen.lines


class Ticks:
    """A clock by which there is time to redraw whenever something came, and for nothing else."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now
