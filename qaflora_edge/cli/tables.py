"""Tables for a terminal; tables and texts of Markdown, in which no text of a file is a mark."""

from collections.abc import Sequence, Set
from html import escape
from itertools import zip_longest

from qaflora_edge.show.picture_text import beginning

_MARKS = str.maketrans({mark: f"\\{mark}" for mark in "\\`*_[]<>|#&~$"})


def plain(text: object) -> str:
    """Write a text on one line, with what a terminal would obey spelt out."""
    return beginning(str(text))


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, bold: Set[tuple[int, int]] = frozenset()
) -> list[str]:
    """A table: the first column to the left, others to the right.

    bold  row and column of cells that stand out
    """
    lines = [
        [
            f"**{escaped(cell)}**" if (row, column) in bold else escaped(cell)
            for column, cell in enumerate(cells)
        ]
        for row, cells in enumerate(rows)
    ]
    rule = [":--", *["--:"] * (len(head) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in ([*map(escaped, head)], rule, *lines)]


def escaped(shown: str) -> str:
    """A text on one line that no mark of Markdown or HTML acts in."""
    return plain(shown).translate(_MARKS)


def folded(summary: str, lines: Sequence[str]) -> list[str]:
    """Lines below a text that opens and closes them."""
    head = ["<details>", f"<summary>{escape(plain(summary))}</summary>", ""]
    return [*head, *lines, "</details>", ""]


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines: the first column to the left, others to the right."""
    widths = [max(map(len, column)) for column in zip_longest(*rows, fillvalue="")]
    return [
        "   ".join(
            f"{cell:{'>' if index else '<'}{width}}"
            for index, (cell, width) in enumerate(zip(row, widths, strict=False))
        ).rstrip()
        for row in rows
    ]
