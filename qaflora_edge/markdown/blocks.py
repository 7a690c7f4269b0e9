"""The top-level blocks of Markdown (a paragraph, a list, code, a table), also while it arrives."""

from __future__ import annotations

import re

from qaflora_edge.markdown.syntax import parse

_MAYBE_MARKER = re.compile(r"(\d{1,9}[.)]?|[-+*])?")  # that of a list's item, whole or half
_BEGIN = re.compile(r" {0,3}(([-+*]|\d{1,9}[.)])[ \t]+\S|#{1,6}[ \t]|>)")  # of what is no paragraph


def block_starts(source: str) -> list[int]:
    """The line that each top-level block begins at."""
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
