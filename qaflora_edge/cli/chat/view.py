"""What a chat shows: plainly for pipes and dumb terminals, or Markdown on a terminal."""

import re
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from qaflora_edge.files import one_line
from qaflora_edge.show import can_show, visible, who_spoke

if TYPE_CHECKING:
    from markdown_it.token import Token

    from qaflora_edge.weighing.plan import FusionWeights

_WAIT_S = 0.4  # nothing is said about a shorter wait
_REDRAW_S = 0.05  # between two redraws
# Stars that multiply, as in 2*3 or (a)*(b), and low lines of names; others stand for them while
# Markdown is parsed.
_SIGNS = re.compile(r"(?<=[0-9A-Za-z)\]|])\*+(?=[0-9A-Za-z(\[|])|_+")
_HIDE = str.maketrans("*_", "\ue000\ue001")
_SHOW = str.maketrans("\ue000\ue001", "*_")
# What models write as text: formulas with backslashes, a[0](1), tags, numbers of items.
_OFF = ("escape", "entity", "link", "image", "autolink", "reference", "lheading", "code", "list")
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")


class View:
    """Shows a chat without escape codes: answers on stdout, everything else on stderr."""

    _is_plain = True

    def __init__(self) -> None:
        self._is_tty = sys.stdout.isatty()

    def begin(self) -> None:
        """Get ready for an answer."""

    def piece(self, text: str) -> None:
        """Show more of an answer; a terminal gets none of its control characters."""
        if self._is_tty:
            text = visible(text)
        click.echo(text, nl=False)

    def thought(self, text: str) -> None:
        """Show more of a thought, or of another adapter's draft, before an answer."""

    def draft(self, text: str) -> None:
        """Show the whole draft, on one line."""

    def expected(self, text: str) -> None:
        """Show the answer so far, of which nothing is decided yet."""

    def progress(self, what: str, done: int, total: int) -> None:
        """Show how far weighing and prefill are."""

    def end(self) -> None:
        click.echo()

    def note(self, *phrases: str) -> None:
        text = visible("; ".join(phrases))
        click.echo(f"[{text}]", err=True, color=False)

    def error(self, error: Exception) -> None:
        click.echo(f"Error: {one_line(str(error))}", err=True, color=False)

    def show(self, text: str) -> None:
        click.echo(text, err=True, color=False)

    def recall(self, text: str) -> None:
        """Show a message of a conversation that goes on."""
        self.show(visible(text))

    def status(self, phrases: Sequence[str], fusion: "FusionWeights") -> None:
        self.note(*phrases, who_spoke(fusion))

    def weights(self, fusion: "FusionWeights") -> None:
        from qaflora_edge.show import print_heatmap

        print_heatmap(fusion, sys.stderr, is_plain=self._is_plain)

    def done(self) -> None:
        """End what was shown for an answer or a command."""


class TerminalView(View):
    """Prints each closed block of Markdown by rich; the open block is plain text below."""

    _is_plain = False

    def __init__(self) -> None:
        from rich.console import Console

        super().__init__()
        self._out = Console(highlight=False, markup=False)
        self._err = Console(highlight=False, markup=False, stderr=True)
        self._dot = " - "
        if can_show("·", sys.stderr.encoding):
            self._dot = " · "

    def begin(self) -> None:
        from rich.live import Live

        click.echo()
        self._open = ""
        self._aside = ""  # a draft or a thought, so far
        self._n_block = 0
        self._drawn = time.perf_counter()
        self._start = self._drawn
        self._live = Live(console=self._out, transient=True, auto_refresh=False)
        self._live.start()

    def piece(self, text: str) -> None:
        self._open += visible(text)
        closed, self._open = split_closed(self._open)
        for block in closed:
            self._print(block)
        if closed or time.perf_counter() - self._drawn > _REDRAW_S:
            self._draw(self._open)

    def draft(self, text: str) -> None:
        self._aside = ""
        line = " ".join(text.split())
        self._out.print(visible(line), style="dim")

    def expected(self, text: str) -> None:
        self._draw(visible(text), "dim")

    def thought(self, text: str) -> None:
        self._aside += visible(text)
        if time.perf_counter() - self._drawn > _REDRAW_S:
            self._draw(self._aside, "dim")

    def progress(self, what: str, done: int, total: int) -> None:
        seconds = time.perf_counter() - self._start
        if seconds > _WAIT_S:
            self._draw(f"{what} {100 * done // total} %  {seconds:.0f} s")

    def end(self) -> None:
        self._live.update("")
        self._live.stop()
        self._print(self._open)

    def _draw(self, text: str, style: str = "") -> None:
        """Draw the end of a text, as much as fits below what is printed for good."""
        from rich.text import Text

        width, height = self._out.size
        end = text[-width * height :]
        lines = Text(end).wrap(self._out, width)
        n_line = max(1, height - 2)
        shown = Text("\n", style).join(lines[-n_line:])
        self._live.update(shown, refresh=True)
        self._drawn = time.perf_counter()

    def _print(self, block: str) -> None:
        from rich.markdown import Markdown

        if not block.strip():
            return
        shown = Markdown("", code_theme="ansi_dark")
        shown.parsed = parse_markdown(block)
        if self._n_block:
            self._out.print()
        self._out.print(shown)
        self._n_block += 1

    def note(self, *phrases: str) -> None:
        text = self._dot.join(phrases)
        self._err.print(visible(text), style="dim")

    def error(self, error: Exception) -> None:
        self._err.print(f"Error: {one_line(str(error))}", style="red")

    def done(self) -> None:
        click.echo(err=True)


def split_closed(text: str) -> tuple[list[str], str]:
    """Split Markdown into blocks that no later text changes, and the open rest.

    A block ends at a blank line, unless a fence of code is open.
    """
    blocks = []
    begin = 0
    fence = ""
    lines = text.split("\n")
    for number, line in enumerate(lines[:-1]):
        if match := _FENCE.match(line):
            if not fence:
                fence = match[1]
            elif line.strip().startswith(fence) and not line.strip().strip(fence[0]):
                fence = ""
        elif not fence and not line.strip():
            block = "\n".join(lines[begin:number])
            if block.strip():
                blocks.append(block)
            begin = number + 1
    return blocks, "\n".join(lines[begin:])


def parse_markdown(block: str) -> "list[Token]":
    """Parse headings, emphasis, code, quotes and tables; all else is text, line by line."""
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark", {"html": False}).enable("table").disable(_OFF)
    hidden = _SIGNS.sub(lambda match: match[0].translate(_HIDE), block)
    tokens = parser.parse(hidden)
    for parent in tokens:
        for token in (parent, *(parent.children or ())):
            token.content = token.content.translate(_SHOW)
            if token.type == "softbreak":
                token.type = "hardbreak"
    return tokens
