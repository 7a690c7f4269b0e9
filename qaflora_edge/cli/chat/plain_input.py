"""Messages from a pipe, or from a terminal that cannot do more: one a line."""

from __future__ import annotations

import sys

import click


class PlainInput:
    """Reads lines from stdin; a terminal is shown where to type."""

    def __init__(self) -> None:
        self._is_tty = sys.stdin.isatty()
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="surrogateescape")  # a line that is no UTF-8 is told so

    def read(self) -> str | None:
        """The next line, or None at the end of the input."""
        if self._is_tty:
            click.echo("> ", nl=False, err=True)
        line = sys.stdin.readline()
        if not line:
            if self._is_tty:
                click.echo(err=True)
            return None
        return line.removesuffix("\n").removesuffix("\r")
