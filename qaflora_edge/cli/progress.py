"""Progress on stderr, on a terminal only: bars for what is counted, a line for what is not."""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from qaflora_edge.cli.show import terminal_size
from qaflora_edge.progress import Tell, silent

PATIENCE_SECONDS = 1.0  # what is quicker needs no word
TURN_SECONDS = 0.25
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
    bars = _Bars()
    try:
        yield bars.tell
    finally:
        bars.finish()


class _Bars:
    """One bar at a time: a new label ends the bar before."""

    def __init__(self) -> None:
        self._label = ""
        self._bar: Any = None
        self._done = 0

    def tell(self, what: str, done: int, total: int) -> None:
        if what != self._label or done < self._done:
            self.finish()
            self._label, self._done = what, 0
            self._bar = click.progressbar(length=max(1, total), label=what, file=sys.stderr)
            self._bar.__enter__()
        self._bar.update(done - self._done)
        self._done = done

    def finish(self) -> None:
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
            self._bar, self._label = None, ""


@contextmanager
def waiting(what: str) -> Iterator[Tell]:
    """Show a line with the seconds so far while the block takes long, and take it back after.

    Gives a function that may be told what is done now, as on_progress of Engine.generate is.
    """
    if not is_shown():
        yield silent
        return
    line = _Line(what)
    thread = threading.Thread(target=line.run, daemon=True)
    thread.start()
    try:
        yield line.tell
    finally:
        line.done.set()
        thread.join()


class _Line:
    """What is waited for, how much of it is done if that is known, and for how long."""

    def __init__(self, what: str) -> None:
        self.done = threading.Event()
        self._what, self._part = what, ""

    def tell(self, what: str, done: int, total: int) -> None:
        self._what, self._part = PROMPT_WORK.get(what, what), f"{100 * done // max(1, total)} %, "

    def run(self) -> None:
        start = time.monotonic()
        if self.done.wait(PATIENCE_SECONDS):
            return
        n_shown = 0
        while True:
            shown = self._text(time.monotonic() - start)
            click.echo(f"\r{shown:<{n_shown}}", nl=False, err=True)
            n_shown = len(shown)
            if self.done.wait(TURN_SECONDS):
                break
        click.echo(f"\r{' ' * n_shown}\r", nl=False, err=True)

    def _text(self, seconds: float) -> str:
        what, part = self._what, self._part
        width = terminal_size(sys.stderr)[0] - len(" ... 100 %, 000 s ")
        label = what if len(what) <= width else f"...{what[-max(1, width - 3) :]}"
        return f"{label} ... {part}{seconds:.0f} s"
