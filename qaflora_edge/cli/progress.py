"""Progress on stderr, on a terminal only: bars for what is counted, a spinner for what is not."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from qaflora_edge.progress import Tell, silent
from qaflora_edge.show import visible

if TYPE_CHECKING:
    from rich.status import Status

PROMPT_WORK = {"weighing": "Weighing the adapters", "reading": "Reading the prompt"}
_N_SHOWN = 60  # characters of an answer that fit a line


def is_shown() -> bool:
    """Tell whether stderr is a terminal that can take back what it shows."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


@contextmanager
def progress_bars() -> Iterator[Tell]:
    """Give a function that draws a bar for each thing it is told of; off a terminal, nothing."""
    if not is_shown():
        yield silent
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Left

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Left())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        tasks = {}

        def tell(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what)
            progress.update(tasks[what], completed=done, total=max(1, total))

        yield tell


class Waiting:
    """Show a line while something takes long, and what is told of it meanwhile."""

    def __init__(self, status: "Status | None" = None) -> None:
        self._status = status

    def tell(self, now: str, done: int, total: int) -> None:
        """Say how far work is, as on_progress of Engine.generate does."""
        label = PROMPT_WORK.get(now, now)
        self._show(f"{label} {100 * done // max(1, total)} %", "")

    def expected(self, text: str) -> None:
        """Show the end of an answer of which nothing is decided yet, as on_draft has it."""
        line = visible(" ".join(text.split()))
        self._show(line[-_N_SHOWN:], "dim")

    def _show(self, line: str, style: str) -> None:
        if self._status is not None:
            from rich.text import Text

            self._status.update(Text(line, style))


@contextmanager
def waiting(what: str) -> Iterator[Waiting]:
    """Show a line while the block takes long, and take it back after."""
    if not is_shown():
        yield Waiting()
        return
    from rich.console import Console
    from rich.markup import escape

    with Console(stderr=True).status(escape(what)) as status:
        yield Waiting(status)
