"""Sets of characters as code point ranges: those of a regular expression, and in JSON's strings."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from functools import cache

Ranges = tuple[tuple[int, int], ...]

_LAST, _SURROGATES = sys.maxunicode, (0xD800, 0xDFFF)
# What stands in a JSON string as it is, and what does so behind a backslash.
_ESCAPES = {0x22: '"', 0x5C: "\\", 0x08: "b", 0x09: "t", 0x0A: "n", 0x0C: "f", 0x0D: "r"}
_CONTROLS: Ranges = ((0, 0x1F), (0x7F, 0x7F))
LINE_ENDS: Ranges = ((0x0A, 0x0A), (0x0D, 0x0D), (0x2028, 0x2029))


def union(sets: Iterable[Ranges]) -> Ranges:
    """Characters of any of the sets, in order and without overlaps."""
    merged: list[tuple[int, int]] = []
    for low, high in sorted(each for ranges in sets for each in ranges):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return tuple(merged)


def complement(ranges: Ranges) -> Ranges:
    """All other characters."""
    found, start = [], 0
    for low, high in union([ranges, (_SURROGATES,)]):
        if start < low:
            found.append((start, low - 1))
        start = high + 1
    return (*found, (start, _LAST)) if start <= _LAST else tuple(found)


def without(ranges: Ranges, others: Ranges) -> Ranges:
    """Characters of the first set that are not in the second."""
    return complement(union([complement(ranges), others]))


@cache
def shorthand(letter: str) -> tuple[Ranges, Ranges]:
    r"""What \d, \w, \s and their opposites have under every dialect, and under any.

    ECMA-262's \d is 0 to 9 and Python's has the digits of all scripts: an answer shall be valid
    whoever looks.
    """
    if letter.isupper():
        least, most = shorthand(letter.lower())
        return complement(most), complement(least)
    digits, spaces = ((0x30, 0x39),), ((0x09, 0x0D), (0x20, 0x20), (0xA0, 0xA0))
    if letter == "d":
        return digits, _where(str.isdecimal)
    if letter == "w":
        word: Ranges = (*digits, (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A))
        return word, union([word, _where(str.isalnum)])
    more = ((0x1680, 0x1680), (0x2000, 0x200A), (0x202F, 0x202F), (0x205F, 0x205F))
    blank = union([spaces, LINE_ENDS, more, ((0x3000, 0x3000),)])
    return blank, union([blank, _where(str.isspace), ((0xFEFF, 0xFEFF),)])


def _where(has: Callable[[str], bool]) -> Ranges:
    codes = (code for code in range(_LAST + 1) if has(chr(code)))
    return union([tuple((code, code) for code in codes)])


def in_json(ranges: Ranges) -> str:
    """One of these characters as a JSON string has it, in GBNF; "" if there is none.

    Control characters without an escape of their own are left out where others are there.
    """
    plain = without(ranges, union([_CONTROLS, ((0x22, 0x22), (0x5C, 0x5C))]))
    options = []
    if plain:
        options.append(f"[{''.join(f'{_code(low)}-{_code(high)}' for low, high in plain)}]")
    escaped = [sign for code, sign in _ESCAPES.items() if _has(ranges, code)]
    if escaped:
        signs = "".join(f"\\{sign}" if sign in '"\\' else sign for sign in escaped)
        options.append(rf'"\\" [{signs}]')
    if not options:
        controls = (code for code in (*range(0x20), 0x7F) if _has(ranges, code))
        options = [rf'"\\u{code:04x}"' for code in controls]
    return options[0] if len(options) == 1 else f"({' | '.join(options)})" if options else ""


def _has(ranges: Ranges, code: int) -> bool:
    return any(low <= code <= high for low, high in ranges)


def _code(code: int) -> str:
    return f"\\U{code:08X}" if code > 0xFFFF else f"\\u{code:04X}"
