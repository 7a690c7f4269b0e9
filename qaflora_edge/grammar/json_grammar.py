"""The grammar of JSON in GBNF, and the pieces that a schema's grammar is put together from.

name  in the functions below: gives a rule a name, and returns it
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

# No surrogates by escapes: two of them would be one character, or one of them none.
_CHAR = (
    r'[^"\\\x00-\x1F\x7F] | "\\" (["\\/bfnrt] | '
    r'"u" ([0-9A-CE-Fa-ce-f] [0-9A-Fa-f]{3} | [Dd] [0-7] [0-9A-Fa-f]{2}))'
)
_DATE = '[0-9]{4} "-" ("0" [1-9] | "1" [0-2]) "-" ("0" [1-9] | "1" [0-9] | "2" [0-8])'
_TIME = (
    '([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9] ":" [0-5] [0-9] ("." [0-9]{1,6})? '
    '("Z" | [+-] ([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9])'
)
_OCTET = '("25" [0-5] | "2" [0-4] [0-9] | "1" [0-9] [0-9] | [1-9]? [0-9])'
_LABEL = '[A-Za-z0-9]{1,16} ("-" [A-Za-z0-9]{1,16}){0,2}'
_HOST = f'{_LABEL} ("." {_LABEL}){{0,2}} "." [A-Za-z]{{2,6}}'
_COUNT = '("0" | [1-9] [0-9]{0,2})'
_HOURS = (
    f'{_COUNT} "H" ({_COUNT} "M")? ({_COUNT} "S")? | {_COUNT} "M" ({_COUNT} "S")? | {_COUNT} "S"'
)
# Of each format: its rule, and its least and most characters. Others are notes.
FORMATS = {
    "date": (_DATE, 10, 10),
    "time": (_TIME, 9, 21),
    "date-time": (f'{_DATE} "T" {_TIME}', 20, 32),
    "duration": (f'"P" ({_COUNT} "D" ("T" ({_HOURS}))? | "T" ({_HOURS}))', 3, 18),
    "uuid": (
        r'[0-9a-f]{8} "-" [0-9a-f]{4} "-" [0-9a-f]{4} "-" [0-9a-f]{4} "-" [0-9a-f]{12}',
        36,
        36,
    ),
    "email": (f'[A-Za-z0-9]{{1,16}} ([._+-] [A-Za-z0-9]{{1,16}}){{0,2}} "@" {_HOST}', 6, 210),
    "ipv4": (' "." '.join([_OCTET] * 4), 7, 15),
    "uri": (
        f'"http" "s"? "://" {_HOST} ("/" [A-Za-z0-9._~-]{{0,40}}){{0,10}} '
        '("?" [A-Za-z0-9._~=&+-]{1,100})? ("#" [A-Za-z0-9._~-]{1,40})?',
        11,
        719,
    ),
}
# Numbers that a float64 holds; strings are written as they are, without needless escapes.
JSON_RULES = {
    "ws": r'(" " | "\n" [ \t]{0,20})?',
    "char": _CHAR,
    "string": r'"\"" char* "\""',
    "number": '"-"? ("0" | [1-9] [0-9]{0,15}) ("." [0-9]{1,15})? ([eE] [+-]? [0-9]{1,2})?',
    "integer": '"-"? ("0" | [1-9] [0-9]{0,15})',
    "boolean": '"true" | "false"',
    "null": '"null"',
    "array": '"[" ws (value ws ("," ws value ws)*)? "]"',
    "object": '"{" ws (member ws ("," ws member ws)*)? "}"',
    "member": 'string ws ":" ws value',
    "value": "object | array | string | number | boolean | null",
}


def joined(parts: list[str]) -> str:
    """Expressions one after another, with commas between them."""
    return ' "," ws '.join(f"{part} ws" for part in parts)


def literal(text: str) -> str:
    """Text as GBNF writes it in quotes."""
    return '"' + "".join(_ESCAPES.get(char, char) for char in text) + '"'


def _in_class(char: str) -> str:
    return "\\" + char if char in "[]-\\" else "\\x5E" if char == "^" else char


_ESCAPES = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r"}


def members_in_order(
    members: Sequence[tuple[str, bool]], more: str, name: Callable[[str], str]
) -> str:
    """Members of an object in order, with commas between those that are there.

    members  the expression of each, and whether it is required
    more     the expression of any number of further ones, or ""

    Two rules for what is left after each member: with one before it, or none.
    """
    after = f'("," ws {more})*' if more else ""
    first = f'({more} ("," ws {more})*)?' if more else ""
    for member, is_required in reversed(members):
        after_name = name(after or '""')
        if is_required:
            first, after = f"{member} {after_name}", f'"," ws {member} {after_name}'
        else:
            first_name = name(first or '""')
            first = f"({member} {after_name} | {first_name})"
            after = f'("," ws {member})? {after_name}'
    return first


def other_key(names: Sequence[str], name: Callable[[str], str]) -> str:
    """Keys that are none of these names; no escapes, by which a name could be spelt anew."""
    plain = [each for each in names if not re.search(r'["\\\x00-\x1f\x7f]', each)]
    return rf'"\"" {_unlike(plain, 0, name)} "\""'


def _unlike(names: Sequence[str], n_done: int, name: Callable[[str], str]) -> str:
    """The rest of a key of which n_done characters agree with all of these names."""
    following: dict[str, list[str]] = {}
    for each in names:
        if len(each) > n_done:
            following.setdefault(each[n_done], []).append(each)
    options = [
        f"{literal(char)} {name(_unlike(group, n_done + 1, name))}"
        for char, group in following.items()
    ]
    known = "".join(map(_in_class, following))
    options.append(rf'[^{known}"\\\x00-\x1F\x7F] [^"\\\x00-\x1F\x7F]*')
    if all(len(each) > n_done for each in names):
        options.append('""')
    return f"({' | '.join(options)})"
