"""A schema's `pattern` as a grammar: regular expressions that are regular, in ECMA-262's notation.

Groups, classes, alternatives, repetitions, and anchors at the ends of an alternative. What looks
around or back is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

from qaflora_edge.errors import GrammarError
from qaflora_edge.grammar.automaton import (
    Chars,
    Choice,
    Node,
    Repeat,
    Run,
    TooManyStates,
    regular_rules,
)
from qaflora_edge.grammar.char_set import LINE_ENDS, Ranges, complement, shorthand, union

MAX_LENGTH, MAX_DEPTH, MAX_REPEAT = 4096, 40, 1000
Fail = Callable[[str, str], GrammarError]

_SIGNS = {"n": 0x0A, "r": 0x0D, "t": 0x09, "f": 0x0C, "v": 0x0B, "0": 0}
_N_HEX, _HEX = {"x": 2, "u": 4}, frozenset("0123456789abcdefABCDEF")
_AROUND = {"=": "lookahead", "!": "lookahead", "<=": "lookbehind", "<!": "lookbehind"}


_ALL = Chars(complement(()))
_BEFORE = Repeat(_ALL, 0, 50)  # what has no ^: not endless, for a base may never come to the point
_AFTER = Repeat(_ALL, 0, None)  # what has no $


def pattern_rules(
    pattern: str, low: int, high: int | None, prefix: str, fail: Fail
) -> dict[str, str]:
    """GBNF rules for what stands between the quotes of a JSON string that a pattern is found in.

    low, high  least and most characters of the string; None is without end
    fail       makes the error of what was found, and of advice
    returns    name -> rule; the first one is the start, and its name is `prefix`

    Raises GrammarError for what is no such pattern, or when nothing fits.
    """
    try:
        rules = regular_rules(_Parser(pattern, fail).pattern(), low, high, prefix)
    except TooManyStates:
        raise fail("'pattern' is too complex", "make it simpler, with ^ and $ around it") from None
    if not rules:
        raise fail("no text fits 'pattern' and the length", "widen one of them")
    return rules


class _Parser:
    def __init__(self, text: str, fail: Fail) -> None:
        self.text, self.at, self._fail, self._depth = text, 0, fail, 0

    def pattern(self) -> Node:
        if len(self.text) > MAX_LENGTH:
            self._refuse(f"{len(self.text)} characters", f"expected at most {MAX_LENGTH}")
        options = [self._whole()]
        while self._take("|"):
            options.append(self._whole())
        if self.at < len(self.text):
            self._refuse("a ) without its (", r"write \) for the sign")
        return options[0] if len(options) == 1 else Choice(tuple(options))

    def _refuse(self, found: str, advice: str) -> NoReturn:
        raise self._fail(f"'pattern' has {found} at character {self.at}", advice)

    def _take(self, text: str) -> bool:
        is_there = self.text.startswith(text, self.at)
        self.at += len(text) * is_there
        return is_there

    def _whole(self) -> Node:
        """An alternative of the whole pattern, with its anchors."""
        before = () if self._take("^") else (_BEFORE,)
        items = self._items()
        after = () if self._take("$") else (_AFTER,)
        if self.text[self.at : self.at + 1] not in ("", "|", ")"):
            self.at -= 1
            self._refuse("$ inside", r"write it at the end, or \$ for the sign")
        return Run((*before, *items, *after)) if items or not (before and after) else _AFTER

    def _items(self) -> list[Node]:
        items: list[Node] = []
        while self.at < len(self.text) and self.text[self.at] not in "|)$":
            items.append(self._repeated(self._atom()))
        return items

    def _group(self) -> Node:
        start = self.at - 1
        if self._take("?") and not self._take(":"):
            rest = self.text[self.at : self.at + 2]
            kind = next((word for sign, word in _AROUND.items() if rest.startswith(sign)), "")
            self.at = start
            self._refuse(f"a {kind}" if kind else f"(?{rest[:1]}", "expected ( or (?:")
        self._depth += 1
        if self._depth > MAX_DEPTH:
            self._refuse(f"more than {MAX_DEPTH} groups in each other", "make it simpler")
        options = [self._items()]
        while self._take("|"):
            options.append(self._items())
        if self.text.startswith("$", self.at):
            self._refuse("$ inside a group", r"write it at the pattern's end, or \$ for the sign")
        if not self._take(")"):
            self.at = start
            self._refuse("a ( that is not closed", "add )")
        self._depth -= 1
        runs = tuple(Run(tuple(items)) for items in options)
        return runs[0] if len(runs) == 1 else Choice(runs)

    def _atom(self) -> Node:
        char = self.text[self.at]
        if char == "^":
            self._refuse("^ inside", r"write it at the beginning, or \^ for the sign")
        if char in "*+?{":
            self._refuse(f"{char} behind nothing that it repeats", f"write \\{char} for the sign")
        self.at += 1
        if char == "(":
            return self._group()
        if char == "[":
            return Chars(self._class())
        if char == ".":
            return Chars(complement(LINE_ENDS))
        if char == "\\":
            found = self._escape(in_class=False)
            return Chars(found[0] if isinstance(found, tuple) else ((found, found),))
        return Chars(((ord(char), ord(char)),))

    def _repeated(self, item: Node) -> Node:
        start = self.at
        low: int = 1
        high: int | None = None
        if self._take("*"):
            low = 0
        elif self._take("?"):
            low, high = 0, 1
        elif self._take("{"):
            high = low = self._number(start)
            if self._take(","):
                high = None if self.text.startswith("}", self.at) else self._number(start)
            if not self._take("}") or (high is not None and high < low):
                self.at = start
                self._refuse("a { that is no repetition", r"write {2}, {2,} or {2,5}, or \{")
        elif not self._take("+"):
            return item
        self._take("?")  # lazy: which match is found does not matter here
        return Repeat(item, low, high)

    def _number(self, start: int) -> int:
        digits = ""
        while self.at < len(self.text) and self.text[self.at] in "0123456789":
            digits += self.text[self.at]
            self.at += 1
        if not digits or len(digits) > 9 or int(digits) > MAX_REPEAT:
            self.at = start
            self._refuse("a { without a number", f"expected one up to {MAX_REPEAT}, or \\{{")
        return int(digits)

    def _class(self) -> Ranges:
        start = self.at - 1
        is_negated = self._take("^")
        least: list[Ranges] = []
        most: list[Ranges] = []
        while not self._take("]"):
            first = self._class_item(start)
            if isinstance(first, tuple):
                least.append(first[0])
                most.append(first[1])
                continue
            last = first
            if self.text.startswith("-", self.at) and self.text[self.at + 1 : self.at + 2] != "]":
                self.at += 1
                end = self._class_item(start)
                if isinstance(end, tuple) or end < first:
                    self.at = start
                    self._refuse("a class with a range that has no end", r"write \- for the sign")
                last = end
            least.append(((first, last),))
            most.append(((first, last),))
        if not least:
            self.at = start
            self._refuse("a class of no characters", "expected at least one")
        return complement(union(most)) if is_negated else union(least)

    def _class_item(self, start: int) -> int | tuple[Ranges, Ranges]:
        if self.at >= len(self.text):
            self.at = start
            self._refuse("a [ that is not closed", "add ]")
        self.at += 1
        if self.text[self.at - 1] == "\\":
            return self._escape(in_class=True)
        return ord(self.text[self.at - 1])

    def _escape(self, *, in_class: bool) -> int | tuple[Ranges, Ranges]:
        """A code point, or the sets of a shorthand, behind a backslash."""
        start, char = self.at - 1, self.text[self.at : self.at + 1]
        self.at += 1
        if char and char in "dDwWsS":
            return shorthand(char)
        if char in _SIGNS and not (char == "0" and self.text[self.at : self.at + 1].isdigit()):
            return _SIGNS[char]
        if char == "b" and in_class:
            return 0x08
        if char in _N_HEX:
            return self._hex(start, char)
        if char and (char in "^$\\.*+?()[]{}|/-" or not (char.isalnum() or char == "_")):
            return ord(char)
        self.at = start
        kinds = {"b": "a word boundary", "B": "a word boundary", "k": "a back-reference"}
        kinds |= {"p": "a Unicode property", "P": "a Unicode property"}
        if char and char in "0123456789":
            kinds[char] = "a back-reference"
        self._refuse(f"{kinds.get(char, 'the escape')} \\{char}", "write it without")

    def _hex(self, start: int, kind: str) -> int:
        n_digit = _N_HEX[kind]
        if kind == "u" and self._take("{"):
            n_digit = max(0, self.text.find("}", self.at) - self.at)
        digits = self.text[self.at : self.at + n_digit]
        is_hex = 0 < len(digits) == n_digit <= 6 and set(digits) <= _HEX
        code = int(digits, 16) if is_hex else -1
        if not 0 <= code <= 0x10FFFF or 0xD800 <= code <= 0xDFFF:
            self.at = start
            self._refuse(f"the escape \\{kind}", "write the character itself")
        is_braced = self.text[self.at - 1] == "{"
        self.at += n_digit + is_braced
        return code
