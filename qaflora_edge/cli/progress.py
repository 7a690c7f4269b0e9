"""Progress bars on stderr, on a terminal only."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

Tell = Callable[[str, int, int], None]


@contextmanager
def progress_bars() -> Iterator[Tell | None]:
    """Give a function that draws a bar for each thing it is told of; None off a terminal."""
    if not sys.stderr.isatty():
        yield None
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
        if what != self._label:
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
