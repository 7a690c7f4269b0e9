"""What a chat shows: plainly, for pipes and dumb terminals, or with Markdown on a terminal."""

import sys
from collections.abc import Sequence

import click

from qaflora_edge.cli.chat.reply import Reply
from qaflora_edge.cli.show import has_signs, paint, terminal_size
from qaflora_edge.files import one_line
from qaflora_edge.show.text import visible, who_spoke
from qaflora_edge.weighing.numbers import FusionWeights

_WAIT_S = 0.4  # nothing is said about a shorter wait


class View:
    """What a chat shows without escape codes: answers on stdout, everything else on stderr."""

    _color: bool | None = False  # of click: None is for a terminal that may have colours

    def __init__(self) -> None:
        self._is_tty = sys.stdout.isatty()

    @property
    def width(self) -> int:
        return terminal_size(sys.stderr)[0]

    def begin(self) -> None:
        """Before an answer."""

    def piece(self, text: str) -> None:
        # A file gets the answer as it is; a terminal none of its control characters.
        click.echo(visible(text, has_signs=False) if self._is_tty else text, nl=False)

    def tick(self, reply: Reply, progress: str | None) -> None:
        """While an answer is waited for.

        progress  what is done before it, in words
        """

    def end(self) -> None:
        click.echo()

    def note(self, *parts: str) -> None:
        text = visible("; ".join(parts), has_signs=False)
        click.echo(f"[{text}]", err=True, color=False)

    def error(self, error: Exception) -> None:
        click.echo(f"Error: {one_line(str(error))}", err=True, color=False)

    def show(self, text: str) -> None:
        click.echo(text, err=True, color=self._color)

    def status(self, parts: Sequence[str], fusion: FusionWeights | None) -> None:
        mix = [] if fusion is None else [who_spoke(fusion)]
        self.note(*parts, *mix)

    def weights(self, fusion: FusionWeights) -> None:
        from qaflora_edge.show.heatmap import print_heatmap

        print_heatmap([("", fusion)], sys.stderr)

    def keys(self) -> None:
        """The keys of an input with line editing, in words."""

    def done(self) -> None:
        """After an answer or a command."""


class TerminalView(View):
    """Markdown as it streams, dim notes, colours unless NO_COLOR forbids them."""

    _color = None

    def __init__(self) -> None:
        from rich.console import Console

        from qaflora_edge.cli.chat.markdown import THEME

        self._console = Console(theme=THEME, highlight=False)
        self._has_signs = has_signs(sys.stdout.encoding)

    @property
    def width(self) -> int:
        return terminal_size(sys.stdout)[0]

    def begin(self) -> None:
        from qaflora_edge.cli.chat.stream import MarkdownStream

        click.echo()
        self._stream = MarkdownStream(
            self._console, size=lambda: terminal_size(sys.stdout), ascii_only=not self._has_signs
        )

    def piece(self, text: str) -> None:
        self._stream.feed(text)

    def tick(self, reply: Reply, progress: str | None) -> None:
        if reply.first_ms is None and reply.elapsed_s > _WAIT_S:
            what = "stopping" if reply.is_stopped else progress or "reading"
            dots = "…" if self._has_signs else "..."
            self._stream.wait(f"{what}{dots} {reply.elapsed_s:.0f} s")
        self._stream.tick()

    def end(self) -> None:
        self._stream.finish()

    def note(self, *parts: str) -> None:
        self._dim(parts)

    def error(self, error: Exception) -> None:
        for line in self._wrapped(f"Error: {one_line(str(error))}"):
            click.echo(paint(line, "red"), err=True)

    def status(self, parts: Sequence[str], fusion: FusionWeights | None) -> None:
        self._dim([*parts, *([] if fusion is None else [who_spoke(fusion)])])

    def keys(self) -> None:
        """The keys of an input with line editing, in words."""
        parts = ("Enter: send", "Alt-Enter or Ctrl-J: new line", "Ctrl-C: stop an answer")
        self._dim([*parts, "Ctrl-D: leave"])

    def done(self) -> None:
        """Leave a line free below what was shown."""
        click.echo(err=True)

    def _dim(self, parts: Sequence[str]) -> None:
        """Parts with dots between them, broken between parts where the line ends."""
        dot = " · " if self._has_signs else " - "
        lines = flow(parts, [dot] * len(parts), self.width)
        for line in (row for text in lines for row in self._wrapped(text)):
            click.echo(click.style(line, dim=True), err=True)

    def _wrapped(self, text: str) -> list[str]:
        """Text in lines that fit, broken between words."""
        from rich.text import Text

        lines = Text(visible(text, has_signs=self._has_signs)).wrap(self._console, self.width)
        return [line.plain.rstrip() for line in lines]


def flow(parts: Sequence[str], gaps: Sequence[str], width: int) -> list[str]:
    """Parts in lines of at most width columns; gaps[i] stands behind part i, within a line."""
    from rich.cells import cell_len

    lines = [parts[0]] if parts else []
    for gap, part in zip(gaps, parts[1:], strict=False):
        if cell_len(lines[-1] + gap + part) <= width:
            lines[-1] += gap + part
        else:
            lines.append(part)
    return lines
