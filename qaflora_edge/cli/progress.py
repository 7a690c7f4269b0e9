"""Progress on stderr: bars on a terminal, and a spinner; elsewhere lines, where they are wanted."""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import click

from qaflora_edge.progress import Tell, silent
from qaflora_edge.show import visible

if TYPE_CHECKING:
    from rich.status import Status

PROMPT_WORK = {"weighing": "Weighing the adapters", "reading": "Reading the prompt"}
_LINES_S = 4.0  # between lines, where nothing can be taken back
_N_SHOWN = 60  # characters of an answer that fit a line


def is_shown() -> bool:
    """Tell whether stderr is a terminal that can take back what it shows."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


@contextmanager
def progress_bars(*, or_lines: bool = False) -> Iterator[Tell]:
    """Give a function that draws a bar for each thing it is told of.

    or_lines  off a terminal, say every few seconds how far it is; else nothing
    """
    if not is_shown():
        with _lines() if or_lines else nullcontext(silent) as tell:
            yield tell
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


@contextmanager
def _lines() -> Iterator[Tell]:
    """Give a function whose last words are said every few seconds, also while it is not called."""
    last = ""
    is_over = threading.Event()

    def tell(what: str, done: int, total: int) -> None:
        nonlocal last
        last = f"{what}: {done} of {total}"

    def repeat() -> None:
        begun_s = time.monotonic()
        while not is_over.wait(_LINES_S):
            if last:
                click.echo(f"{last}, after {time.monotonic() - begun_s:.0f} s", err=True)

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield tell
    finally:
        is_over.set()
        thread.join()


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
