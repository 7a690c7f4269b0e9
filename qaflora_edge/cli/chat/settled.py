"""How much of a block that still grows can no longer change, and may scroll out of reach."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from markdown_it.token import Token
from rich.cells import cell_len

from qaflora_edge.cli.chat.markdown import parse

_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_OPENS = re.compile(r"[*_~]")  # what is shown of emphasis has no end yet
_TAKES_BACK = re.compile(r"[\[`]")  # a link or code could take what is before it out of emphasis


def n_settled(
    source: str, rows: Sequence[str], width: int, render: Callable[[str], list[str]]
) -> int:
    """How many first rows of a block stay as they are, whatever comes behind its source.

    The text stays; the colours of code may not. 0 where it cannot be told, as of tables.

    rows    the block as render(source) gave it, for lines of so many columns
    """
    top = [token for token in parse(source) if token.level == 0 and token.nesting >= 0]
    if len(top) != 1:
        return 0
    lines = source.rstrip("\n").split("\n")
    if top[0].type == "fence":
        # The line at the bottom and those of the last line of code, wherever it wraps.
        return max(0, len(rows) - 2 - _n_row_most(lines[-1], width))
    if top[0].type == "paragraph_open":
        return _n_settled_paragraph(lines, rows, width)
    if top[0].type in ("bullet_list_open", "ordered_list_open"):
        return _n_settled_list(source, rows, render)
    return 0


def _n_settled_paragraph(lines: Sequence[str], rows: Sequence[str], width: int) -> int:
    """All but the end, which the next word may move, from the first mark without an end on."""
    if any("|" in line for line in lines[-2:]):  # it may be the head of a table
        return 0
    words = lines[-1].split(" ")
    n = max(0, len(rows) - 1 - _n_row_most(words[-1], width))
    for index, row in enumerate(rows[:n]):
        text = _ESCAPE.sub("", row)
        if _OPENS.search(text):
            n = min(n, index)
    if any(_TAKES_BACK.search(_ESCAPE.sub("", row)) for row in rows):
        return 0
    return n


def _n_settled_list(source: str, rows: Sequence[str], render: Callable[[str], list[str]]) -> int:
    """All items but the last one."""
    items = [token for token in parse(source) if _is_item(token)]
    begin = items[-1].map[0] if items and items[-1].map else 0
    last = render("\n".join(source.split("\n")[begin:]))
    n = len(rows) - len(last)
    return n if n > 0 and list(rows[n:]) == last else 0


def _is_item(token: Token) -> bool:
    return token.type == "list_item_open" and token.level == 1


def _n_row_most(text: str, width: int) -> int:
    """Rows that a text takes at most, where lines are broken between words."""
    return 1 + 2 * cell_len(text.expandtabs()) // max(1, width)
