"""Progress on stderr, on a terminal only: bars for what is counted, a spinner for what is not."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from qaflora_edge.progress import Tell, silent

PROMPT_WORK = {"weighing": "Weighing the adapters", "reading": "Reading the prompt"}


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


@contextmanager
def waiting(what: str) -> Iterator[Tell]:
    """Show a line while the block takes long, and take it back after.

    Gives a function that may be told what is done now, as on_progress of Engine.generate is.
    """
    if not is_shown():
        yield silent
        return
    from rich.console import Console
    from rich.markup import escape

    with Console(stderr=True).status(escape(what)) as status:

        def tell(now: str, done: int, total: int) -> None:
            label = escape(PROMPT_WORK.get(now, now))
            status.update(f"{label} {100 * done // max(1, total)} %")

        yield tell
