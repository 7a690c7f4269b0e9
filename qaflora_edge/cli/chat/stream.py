"""Markdown rendered while it arrives: whole blocks for good, the last one live."""

import itertools
import time
from collections.abc import Callable, Sequence
from typing import IO

from rich.cells import cell_len
from rich.console import Console
from wcwidth import wcwidth

from qaflora_edge.cli.chat.markdown import render_block
from qaflora_edge.cli.chat.settled import ESCAPE, n_settled
from qaflora_edge.markdown.syntax import block_starts, sure_starts
from qaflora_edge.show.text import visible


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
    text = ESCAPE.sub("", line)
    columns_at = list(itertools.accumulate(max(0, wcwidth(char)) for char in text))
    if not text or columns_at[-1] <= columns:
        return line
    return text[: sum(column <= columns for column in columns_at)]


def _n_row(line: str, columns: int) -> int:
    """Rows that a line takes; a terminal that became narrower has wrapped it."""
    return max(1, -(-cell_len(ESCAPE.sub("", line)) // max(1, columns)))


_REDRAW_S = 0.08
_LOAD = 5  # a redraw is followed by a pause of at least so many times its own duration


class MarkdownStream:
    """An answer on a terminal.

    A block (a paragraph, a list, code, a table) is printed once and for all when the next one has
    begun. The one that still grows is redrawn below. Where it is taller than half the screen,
    lines of it that can no longer change are printed for good. Of those that can, as all of a
    table can, only the last ones are shown, and all once the block is complete.

    size  gives (columns, rows) of the terminal as it is now
    """

    def __init__(
        self,
        console: Console,
        *,
        size: Callable[[], tuple[int, int]],
        ascii_only: bool,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._console, self._ascii_only, self._clock = console, ascii_only, clock
        self._size, self._live = size, LiveLines(console.file, size)
        self._source = ""  # of blocks that are not printed for good
        self._n_printed = 0  # lines of the first of these blocks that are printed for good
        self._kept_width: int | None = None  # in columns, for as long as that is so
        self._has_block = False
        self._is_changed = False
        self._redraw_at = 0.0

    def wait(self, line: str) -> None:
        """Show a passing line until the answer begins."""
        if not self._has_block and not self._source.strip():
            self._live.update([], [line[: self._width]])

    def feed(self, text: str) -> None:
        """Take more of the answer."""
        self._source += visible(text, has_signs=not self._ascii_only)
        self._is_changed = True
        self.tick()

    def tick(self) -> None:
        """Redraw, if there is something new and it is time."""
        start = self._clock()
        if self._is_changed and start >= self._redraw_at:
            for_good = self._take_whole_blocks()
            lines = self._rendered(self._source)
            n_printed = max(self._n_printed, self._n_printable(lines))
            for_good += lines[self._n_printed : n_printed]
            self._live.update(for_good, lines[n_printed:])
            if n_printed > self._n_printed:
                self._n_printed, self._kept_width = n_printed, self._width
            self._is_changed = False
            now = self._clock()
            self._redraw_at = now + max(_REDRAW_S, _LOAD * (now - start))

    def finish(self) -> None:
        """Print the rest for good."""
        for_good = self._take_whole_blocks()
        rest = self._rendered(self._source)[self._n_printed :]
        self._live.update([*for_good, *rest], [])
        self._source, self._n_printed, self._kept_width = "", 0, None

    @property
    def _width(self) -> int:
        """Columns of the first block that is not printed for good, at least in part."""
        # The last column stays free: terminals disagree about the width of some signs.
        return self._kept_width or max(1, self._size()[0] - 1)

    def _n_printable(self, lines: list[str]) -> int:
        """How many of the lines that are not printed for good, nor were, can be."""
        n_over = len(lines) - self._size()[1] // 2
        if n_over <= self._n_printed:
            return 0
        rows = self._source.split("\n")
        second = [*block_starts(self._source)[1:2], len(rows)][0]
        n_blank = int(self._has_block)
        block = "\n".join(rows[:second])
        n = n_settled(block, lines[n_blank:], self._width, self._block)
        return min(n_over, n + n_blank) if n else 0

    def _take_whole_blocks(self) -> list[str]:
        """Lines of the blocks that nothing can change any more, which leave the source."""
        rows = self._source.split("\n")
        starts = sure_starts(rows)
        lines: list[str] = []
        for start, end in itertools.pairwise(starts):
            lines += self._rendered("\n".join(rows[start:end]))[self._n_printed :]
            self._n_printed, self._kept_width = 0, None
            self._has_block = self._has_block or bool(lines)
        if len(starts) > 1:
            self._source = "\n".join(rows[starts[-1] :])
        return lines

    def _rendered(self, source: str) -> list[str]:
        """Blocks as lines, with a blank one before each but the first of the answer."""
        rows = source.split("\n")
        lines: list[str] = []
        has_block = self._has_block
        for start, end in itertools.pairwise([*block_starts(source), len(rows)]):
            block = self._block("\n".join(rows[start:end]))
            lines += ["", *block] if has_block and block else block
            has_block = has_block or bool(block)
        return lines

    def _block(self, source: str) -> list[str]:
        """One block as lines."""
        return render_block(self._console, source, self._width, ascii_only=self._ascii_only)
