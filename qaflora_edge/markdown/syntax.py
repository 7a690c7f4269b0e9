"""What is Markdown in an answer: less than elsewhere, for no number and no formula may lose a sign.

A star is emphasis neither inside a word nor beside a digit, as in `2*3*4`; `__` never is, as in
`__init__`. A backslash that is LaTeX stays, as in `\\(x\\)`. Links have an address of the web.
"""

import re
from collections.abc import MutableMapping
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.parser_inline import ParserInline
from markdown_it.rules_block import StateBlock
from markdown_it.rules_block import table as read_table
from markdown_it.rules_block.table import escapedSplit
from markdown_it.rules_inline import StateInline
from markdown_it.rules_inline import escape as read_escape
from markdown_it.rules_inline.state_inline import Scanned
from markdown_it.token import Token
from wcwidth import wcwidth

_BEFORE = frozenset("([{\"'“‘«„¿¡—–*_~")  # what may stand before emphasis, beside blanks
_BEHIND = frozenset(")]}\"'”’»“.,;:!?…—–-*_~")
_LATEX = frozenset("()[]{}\\,:;|")  # behind a backslash, LaTeX's: `\(`, `\\`, `\,`
_ADDRESS = re.compile(r"(https?|ftp|mailto):", re.IGNORECASE)


def may_open(before: str, run: str, behind: str) -> bool:
    """Whether a run of stars may begin emphasis. `before` and `behind` are one sign, or none."""
    return _is_edge(before, _BEFORE) and not _is_text(before, run, behind) and bool(behind.strip())


def may_close(before: str, run: str, behind: str) -> bool:
    """Whether a run of stars may end emphasis."""
    return _is_edge(behind, _BEHIND) and not _is_text(before, run, behind) and bool(before.strip())


def _is_edge(char: str, marks: frozenset[str]) -> bool:
    """Whether words end here: at a blank, a mark, or a script that is written without blanks."""
    return not char.strip() or char in marks or wcwidth(char) == 2


def _is_text(before: str, run: str, behind: str) -> bool:
    is_beside_digit = len(run) == 1 and (before.isdigit() or behind.isdigit())
    return is_beside_digit or (run[0] == "_" and len(run) > 1)


class _InlineState(StateInline):
    def scanDelims(self, start: int, canSplitWord: bool) -> Scanned:
        can_open, can_close, length = super().scanDelims(start, canSplitWord)
        end = start + length
        around = self.src[max(0, start - 1) : start], self.src[start:end], self.src[end : end + 1]
        return Scanned(can_open and may_open(*around), can_close and may_close(*around), length)


class _Inline(ParserInline):
    def parse(
        self, src: str, md: MarkdownIt, env: MutableMapping[str, Any], tokens: list[Token]
    ) -> list[Token]:
        state = _InlineState(src, md, env, tokens)
        self.tokenize(state)
        for rule in self.ruler2.getRules(""):
            rule(state)
        return state.tokens


def _escape(state: StateInline, silent: bool) -> bool:
    """Read an escape; where it is LaTeX's, the backslash is part of the text."""
    start = state.pos
    if not read_escape(state, silent):
        return False
    if not silent and state.src[start + 1 : start + 2] in _LATEX:
        state.tokens[-1].content = state.src[start : state.pos]
    return True


def _table(state: StateBlock, startLine: int, endLine: int, silent: bool) -> bool:
    """Read a table whose rows begin with a bar, unless a row has more cells than can be shown."""
    if state.src[state.bMarks[startLine] + state.tShift[startLine]] != "|":
        return False
    n_token = len(state.tokens)
    if not read_table(state, startLine, endLine, silent):
        return False
    if silent or not _has_more_cells(state, startLine):
        return True
    del state.tokens[n_token:]
    state.line = startLine
    return False


def _has_more_cells(state: StateBlock, start: int) -> bool:
    """Whether a row of the table that was just read has more cells than its head."""
    n_head = _n_cell(state, start)
    return any(_n_cell(state, row) > n_head for row in range(start + 2, state.line))


def _n_cell(state: StateBlock, line: int) -> int:
    text = state.src[state.bMarks[line] + state.tShift[line] : state.eMarks[line]].strip()
    cells = escapedSplit(text)
    return len(cells) - (cells[0] == "") - (len(cells) > 1 and cells[-1] == "")


def _make_parser() -> MarkdownIt:
    # No HTML, images and definitions of links: they would not be shown. No underlined headings:
    # `Steps:` would become one for as long as only the first `-` of the list below it has arrived.
    parser = MarkdownIt("commonmark", {"html": False})
    parser.inline = _Inline()
    parser.enable(["strikethrough", "table"])
    parser.disable(["lheading", "reference", "image", "autolink", "linkify", "html_inline"])
    parser.inline.ruler.at("escape", _escape)
    parser.block.ruler.at("table", _table, {"alt": ["paragraph", "reference"]})
    parser.validateLink = lambda url: _ADDRESS.match(url) is not None  # type: ignore[method-assign]
    parser.normalizeLink = lambda url: url  # type: ignore[method-assign]
    return parser


_PARSER = _make_parser()


def parse(source: str) -> list[Token]:
    """Markdown's tokens; a line end within a paragraph stays one."""
    tokens = _PARSER.parse(source)
    for token in tokens:
        for child in token.children or ():
            if child.type == "softbreak":
                child.type = "hardbreak"
    return tokens


_MAYBE_MARKER = re.compile(r"(\d{1,9}[.)]?|[-+*])?")  # that of a list's item, whole or half
_BEGIN = re.compile(r" {0,3}(([-+*]|\d{1,9}[.)])[ \t]+\S|#{1,6}[ \t]|>)")  # of what is no paragraph


def block_starts(source: str) -> list[int]:
    """The line that each top-level block begins at: a paragraph, a list, code, a table."""
    return sorted({token.map[0] for token in parse(source) if token.map and token.level == 0})


def sure_starts(rows: list[str]) -> list[int]:
    """The rows at which blocks begin, whatever comes behind them.

    Whole rows tell: `2` may yet become `2.`, an item of the list above it. So does the row that
    still grows where it cannot join the block above: a model writes a paragraph as one row.
    """
    starts = block_starts("\n".join(rows[:-1]))
    if starts and block_starts("\n".join(rows))[-1] == len(rows) - 1:
        above = parse("\n".join(rows[starts[-1] : -1]))[0].type
        if _stands_apart(above, rows[-1], is_below_blank=not rows[-2].strip()):
            starts.append(len(rows) - 1)
    return starts


def _stands_apart(above: str, row: str, *, is_below_blank: bool) -> bool:
    """Whether a row at which a block begins does so whatever comes behind it in that row.

    above  the type of the first token of the block above
    """
    if _BEGIN.match(row):
        return True
    if above in ("heading_open", "hr", "fence", "code_block"):
        return row[:1].strip() != ""
    if above in ("bullet_list_open", "ordered_list_open"):
        is_marker = _MAYBE_MARKER.fullmatch(row.split(" ")[0]) is not None
        return is_below_blank and row[:1].strip() != "" and not is_marker
    return is_below_blank and row.strip() != ""


def cut(source: str) -> tuple[str, str]:
    """What has been said for good, whatever comes behind it, and the rest: its last block."""
    rows = source.split("\n")
    starts = sure_starts(rows)
    n_row = starts[-1] if len(starts) > 1 else 0
    return "".join(row + "\n" for row in rows[:n_row]), "\n".join(rows[n_row:])
