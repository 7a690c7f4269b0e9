"""Markdown as lines for a terminal, by rich; what chat needs different is here."""

from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar, Self

from markdown_it.token import Token
from pygments.token import Comment, Keyword, Name, Number, Operator, String
from rich.box import SIMPLE
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markdown import (
    CodeBlock,
    Heading,
    ListElement,
    ListItem,
    Markdown,
    MarkdownElement,
    TableElement,
)
from rich.segment import Segment, Segments
from rich.style import Style
from rich.syntax import ANSISyntaxTheme, Syntax
from rich.table import Table
from rich.text import Text
from rich.theme import Theme

from qaflora_edge.cli.show import to_ascii
from qaflora_edge.markdown.syntax import parse

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


class _Item(ListItem):
    """An item that knows its mark: the number that was written, which rich would count anew."""

    mark = number = ""

    @classmethod
    def create(cls, markdown: Markdown, token: Token) -> Self:
        item = cls()
        item.mark, item.number = token.markup, token.info
        return item


class _List(ListElement):
    """A list whose numbers take the same room however many follow: what is shown stays there."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        kind = "number" if self.list_type == "ordered_list_open" else "bullet"
        style = console.get_style(f"markdown.item.{kind}")
        for item in self.items:
            assert isinstance(item, _Item)
            sign = f"{item.number:>3} " if item.number else " • "
            narrower = options.update(width=max(1, options.max_width - len(sign)))
            rows = console.render_lines(item.elements, narrower, style=item.style)
            if not rows:  # perhaps no list at all, but an answer such as `24.`
                sign, rows = f"{item.number}{item.mark}", [[]]
            for index, row in enumerate(rows):
                yield Segment(" " * len(sign) if index else sign, style)
                yield from row
                yield Segment.line()


class _Table(TableElement):
    """A table that cuts nothing: cells wrap between words, or each row becomes a list of fields."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        head = [] if self.header is None or self.header.row is None else self.header.row.cells
        rows = [] if self.body is None else [row.cells for row in self.body.rows]
        names = [cell.content for cell in head]
        for name in names:
            name.stylize("markdown.table.header")
        cells = [[cell.content for cell in row] for row in rows]
        room = options.max_width - 2 * len(names)  # a blank at each side, two between columns
        widths = _column_widths([names, *cells], room)
        if widths is None:
            yield from _fields(names, cells)
            return
        table = Table(box=SIMPLE, pad_edge=False, style="markdown.table.border")
        table.collapse_padding = True
        for name, width in zip(names, widths, strict=True):
            table.add_column(name, width=width, overflow="fold")
        for row in cells:
            table.add_row(*row)
        yield table


def _column_widths(rows: Sequence[Sequence[Text]], room: int) -> list[int] | None:
    """The width of each column, so that no word is broken; None where they have no room."""
    columns = list(zip(*rows, strict=True))
    least = [max(_widest(cell.plain.split()) for cell in column) for column in columns]
    wanted = [max(cell.cell_len for cell in column) for column in columns]
    spare, missing = room - sum(least), sum(wanted) - sum(least)
    if spare < 0:
        return None
    part = min(1.0, spare / missing) if missing else 0.0
    return [max(1, n + int(part * (m - n))) for n, m in zip(least, wanted, strict=True)]


def _widest(words: Iterable[str]) -> int:
    return max(map(cell_len, words), default=1)


def _fields(names: Sequence[Text], rows: Sequence[Sequence[Text]]) -> Iterator[Text]:
    """The rows of a table below each other, a field a line."""
    if not rows:
        yield Text(" ").join(names)
    for index, row in enumerate(rows):
        if index:
            yield Text()
        for name, cell in zip(names, row, strict=True):
            yield Text.assemble(name, ": ", cell)


class _Answer(Markdown):
    """Markdown as we read it."""

    elements: ClassVar[dict[str, type[MarkdownElement]]] = {
        **Markdown.elements,
        "heading_open": _Heading,
        "bullet_list_open": _List,
        "ordered_list_open": _List,
        "list_item_open": _Item,
        "table_open": _Table,
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
