"""How much of a block that still grows can no longer change, and may scroll out of reach."""

import re
from collections.abc import Callable, Sequence

from markdown_it.token import Token
from rich.cells import cell_len

from qaflora_edge.markdown.syntax import may_close, may_open, parse

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_MARK = re.compile(r"\\.|`+|\*+|_+|~~+|\[|\]\(?|[()]", re.DOTALL)
_MAYBE_HEAD = re.compile(r"[\s>*+\-\d.)]*\|")  # the first row of a table, behind the marks of lists


def n_settled(
    source: str, rows: Sequence[str], width: int, render: Callable[[str], list[str]]
) -> int:
    """How many first rows of a block stay as they are, whatever comes behind its source.

    The text stays; the colours of code may not. 0 where it cannot be told, as of tables.

    rows    the block as render(source) gave it, for lines of so many columns
    """
    kept = source[: _n_settled_char(source)]
    head = render(kept)
    # The row at the end, or below code, and those that the next letters of the last word may move.
    n = len(head) - 1 - _n_row_most(re.split(r"[ \n]", kept.rstrip("\n"))[-1], width)
    texts = ([ESCAPE.sub("", row) for row in shown] for shown in (rows, head[: max(0, n)]))
    same = map(str.__eq__, *texts)
    return next((i for i, is_same in enumerate(same) if not is_same), min(len(rows), max(0, n)))


def _n_settled_char(source: str) -> int:
    """How many first characters of a block mean what they mean whatever follows."""
    lines = source.split("\n")
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line) + 1)
    last = _last_leaf(parse(source))
    if last is None or last.map is None:
        return 0
    begin, end = last.map[0], min(last.map[1], len(lines))
    if last.type in ("fence", "code_block"):
        return starts[len(lines) - 1]  # but the last line
    if last.type == "table_open":
        return starts[begin]
    heads = (i for i in range(max(begin, end - 2), end) if _MAYBE_HEAD.match(lines[i]))
    end = next(heads, end)
    return starts[begin] + _n_closed(source[starts[begin] : max(starts[begin], starts[end] - 1)])


def _last_leaf(tokens: Sequence[Token]) -> Token | None:
    """The last part of a block that has text of its own; a table as a whole."""
    leaf, n_table = None, 0
    for token in tokens:
        n_table += {"table_open": 1, "table_close": -1}.get(token.type, 0)
        if token.type == "table_open" or (
            token.type in ("inline", "fence", "code_block") and not n_table
        ):
            leaf = token
    return leaf


def _n_closed(text: str) -> int:
    """How many first characters of running text no later mark can make part of something.

    Emphasis, code or a link that is open at the end could take the text behind its first mark.
    """
    opened: list[tuple[str, int]] = []  # emphasis and its place
    brackets: list[int] = []  # for each `[`, where what it may undo begins
    place = 0
    while found := _MARK.search(text, place):
        mark, start, place = found[0], found.start(), found.end()
        first = opened[0][1] if opened else start
        if mark[0] == "`":
            end = re.compile(rf"(?<!`){mark}(?!`)").search(text, place)
            if end is None or end.end() == len(text):
                return min([first, *brackets])
            place = end.end()
        elif mark == "[":
            brackets.append(first)
        elif mark[0] == "]" and brackets:
            if place == len(text):
                break
            if mark == "](":
                close = _closing(text, place)
                if close is None:
                    break
                place = close
            brackets.pop()
        elif mark[0] in "*_~":
            if place == len(text):
                return min([first, *brackets])
            around = text[start - 1 : start] if start else "", mark, text[place]
            known = [i for i, (other, _) in enumerate(opened) if other[0] == mark[0]]
            if known and may_close(*around):
                if opened[known[-1]][0] != mark:  # `**` and `*`: a star is left over
                    break
                del opened[known[-1] :]
            elif may_open(*around):
                opened.append((mark, start))
    return min([len(text), *brackets, *(start for _, start in opened[:1])])


def _closing(text: str, place: int) -> int | None:
    """Behind the bracket that closes the one before a place, if it is there."""
    depth = 1
    for found in re.compile(r"[()]").finditer(text, place):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.end()
    return None


def _n_row_most(text: str, width: int) -> int:
    """Rows that a text takes at most, where lines are broken between words."""
    return 1 + 2 * cell_len(text.expandtabs()) // max(1, width)
