"""Markdown as lines for a terminal, by rich; what chat needs different is here."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from markdown_it import MarkdownIt
from markdown_it.token import Token
from pygments.token import (  # type: ignore[import-untyped]
    Comment,
    Keyword,
    Name,
    Number,
    Operator,
    String,
)
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markdown import CodeBlock, Heading, ListElement, Markdown, MarkdownElement
from rich.segment import Segment, Segments
from rich.style import Style
from rich.syntax import ANSISyntaxTheme, Syntax
from rich.text import Text
from rich.theme import Theme

from qaflora_edge.cli.chat.signs import to_ascii

# Colours of the terminal's own palette that can be read on a light ground and on a dark one.
THEME = Theme(
    {
        "markdown.h1": Style(bold=True, underline=True),
        **{f"markdown.h{level}": Style(bold=True) for level in range(2, 7)},
        "markdown.code": Style(color="cyan"),
        "markdown.item.bullet": Style(bold=True),
        "markdown.item.number": Style(bold=True),
        "markdown.block_quote": Style(italic=True),
        "markdown.hr": Style(dim=True),
        "markdown.link": Style(underline=True),
        "markdown.link_url": Style(underline=True),
        "markdown.table.border": Style(dim=True),
        "markdown.table.header": Style(bold=True),
    }
)
_CODE = ANSISyntaxTheme(
    {
        Comment: Style(dim=True, italic=True),
        Keyword: Style(color="cyan"),
        Operator.Word: Style(color="cyan"),
        Name.Function: Style(color="blue", bold=True),
        Name.Class: Style(color="blue", bold=True),
        Name.Decorator: Style(color="magenta"),
        String: Style(color="green"),
        Number: Style(color="magenta"),
    }
)
# No HTML and no definitions of links: they would not be shown. No underlined headings: `Steps:`
# would become one for as long as only the first `-` of the list below it has arrived.
_PARSER = (
    MarkdownIt("commonmark", {"html": False})
    .enable(["strikethrough", "table"])
    .disable(["lheading", "reference"])
)


def parse(source: str) -> list[Token]:
    """Markdown's tokens; a line end within a paragraph stays one."""
    tokens = _PARSER.parse(source)
    for token in tokens:
        for child in token.children or ():
            if child.type == "softbreak":
                child.type = "hardbreak"
    return tokens


def block_starts(source: str) -> list[int]:
    """The line that each top-level block begins at."""
    return sorted({token.map[0] for token in parse(source) if token.map and token.level == 0})


class _Heading(Heading):
    """A bold line; rich puts the first level in a box and centres the others."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        self.text.justify = "left"
        yield self.text


class _CodeBlock(CodeBlock):
    """Code without margin or ground, to be copied as it stands, between two thin lines."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        language = "" if self.lexer_name in ("", "default", "text") else f" {self.lexer_name}"
        yield Text(f"───{language}", style="markdown.hr", no_wrap=True, overflow="ellipsis")
        yield Syntax(
            str(self.text).rstrip("\n"),
            self.lexer_name,
            theme=_CODE,
            word_wrap=True,
            background_color="default",
        )
        yield Text("───", style="markdown.hr")


class _List(ListElement):
    """A list whose numbers take the same room however many follow: what is shown stays there."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        is_bullet = self.list_type == "bullet_list_open"
        for number, item in enumerate(self.items, self.list_start or 0):
            if is_bullet:
                yield from item.render_bullet(console, options)
            else:
                yield from item.render_number(console, options, number, max(10, number))


class _Answer(Markdown):
    """Markdown as we read it."""

    elements: ClassVar[dict[str, type[MarkdownElement]]] = {
        **Markdown.elements,
        "heading_open": _Heading,
        "bullet_list_open": _List,
        "ordered_list_open": _List,
        "fence": _CodeBlock,
        "code_block": _CodeBlock,
    }

    def __init__(self, source: str) -> None:
        super().__init__("", hyperlinks=False)
        self.parsed = parse(source)


def render_block(console: Console, source: str, width: int, *, ascii_only: bool) -> list[str]:
    """One block as lines with their escapes, at most width cells wide, none blank at its ends."""
    options = console.options.update(width=max(1, width), height=None)
    rows = [_stripped(row) for row in console.render_lines(_Answer(source), options, pad=False)]
    while rows and not rows[0]:
        rows.pop(0)
    while rows and not rows[-1]:
        rows.pop()
    if ascii_only:
        rows = [[Segment(to_ascii(part.text), part.style) for part in row] for row in rows]
    with console.capture() as capture:
        for row in rows:
            console.print(Segments([*row, Segment.line()]), end="", crop=False, no_wrap=True)
    return capture.get().split("\n")[: len(rows)]


def _stripped(row: Iterable[Segment]) -> list[Segment]:
    """A row without the blanks at its end."""
    parts = [part for part in row if part.text and not part.control]
    while parts and not parts[-1].text.strip():
        parts.pop()
    if parts:
        parts[-1] = Segment(parts[-1].text.rstrip(), parts[-1].style)
    return parts
