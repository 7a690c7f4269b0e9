"""Messages from a pipe, or from a terminal that cannot do more: one a line."""

import sys

import click

from qaflora_edge.cli.chat.reply import interrupts_call


class PlainInput:
    """Reads lines from stdin; a terminal is shown where to type."""

    def __init__(self) -> None:
        self._is_tty = sys.stdin.isatty()
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="surrogateescape")  # a line that is no UTF-8 is told so

    def read(self) -> str | None:
        """The next line, or None at the end of the input.

        Ctrl-C takes back the line that is being typed; off a terminal it raises KeyboardInterrupt.
        """
        if not self._is_tty:
            return _line()
        while True:
            click.echo("> ", nl=False, err=True)
            try:
                with interrupts_call(_interrupt):
                    line = _line()
            except KeyboardInterrupt:
                click.echo(err=True)
                continue
            if line is None:
                click.echo(err=True)
            return line


def _line() -> str | None:
    line = sys.stdin.readline().removeprefix("\ufeff")  # a byte order mark
    return line.removesuffix("\n").removesuffix("\r") if line else None


def _interrupt() -> None:
    raise KeyboardInterrupt
