"""GBNF, llama.cpp's notation for grammars: checked before the library sees it.

The library prints what it cannot parse, aborts or never returns for some grammars that it takes
(a{3,2}, hidden left recursion), and tells no place. So its parser is followed here step by step
(llama.cpp 0c1e5709, llama-grammar.cpp llama_grammar_parser), and what it would not survive is
refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from qaflora_edge.errors import GrammarError

ROOT = "root"
MAX_LENGTH = 1 << 20  # characters
MAX_RULES = 20_000  # written ones, and those that groups and repetitions become
MAX_DEPTH = 64  # groups in groups
MAX_REPEAT = 2000  # llama-grammar.cpp MAX_REPETITION_THRESHOLD
MAX_STEPS = 1_000_000  # of the library's search for left recursion, which forgets what it has seen

_WORD = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-")
_DIGITS = frozenset("0123456789")
_HEX = frozenset("0123456789abcdefABCDEF")
_ESCAPED = frozenset('trn\\"[]-')
_N_HEX = {"x": 2, "u": 4, "U": 8}


@dataclass
class _Rule:
    """Alternatives, each a sequence of items; an item is a rule's name, or None for a character."""

    at: int
    alternatives: list[list[str | None]] = field(default_factory=list)
    is_optional: bool = False


def check_gbnf(text: str, *, source: str = "The grammar") -> None:
    """Refuse a grammar that the library would not take, or not survive.

    source  how messages call the grammar, such as "The grammar list.gbnf"

    Raises GrammarError with line and column.
    """
    if len(text) > MAX_LENGTH:
        raise GrammarError(
            f"{source} has {len(text)} characters, expected at most {MAX_LENGTH}; make it smaller."
        )
    parser = _Parser(text, source)
    parser.parse()
    _check_left_recursion(parser)


class _Parser:
    """One pass over the text; `rules` has every written rule, group and repetition."""

    def __init__(self, text: str, source: str) -> None:
        self.text, self.source, self.at = text, source, 0
        self.rules: dict[str, _Rule] = {}
        self.references: dict[str, int] = {}  # name -> where it is first used
        self._symbols: set[str] = set()
        self._depth = 0

    def fail(self, at: int, found: str, advice: str) -> GrammarError:
        line = self.text.count("\n", 0, at) + 1
        column = at - self.text.rfind("\n", 0, at)
        return GrammarError(f"{self.source}, line {line}, column {column}: {found}; {advice}.")

    def parse(self) -> None:
        for at, char in enumerate(self.text):
            if char == "\0" or "\ud800" <= char <= "\udfff":
                raise self.fail(at, f"found {char!r}", "expected text that UTF-8 can write")
        self._space(newline=True)
        while self.at < len(self.text):
            self._rule()
        for name, at in self.references.items():
            if name not in self.rules:
                raise self.fail(at, f"the rule {name!r} is not defined", f"add {name} ::= ...")
        if ROOT not in self.rules:
            raise self.fail(0, f"there is no rule {ROOT!r}", f"add {ROOT} ::= ..., the start")

    def _peek(self) -> str:
        return self.text[self.at] if self.at < len(self.text) else ""

    def _what(self) -> str:
        return f"found {self._peek()!r}" if self._peek() else "found the end"

    def _space(self, *, newline: bool) -> None:
        blank = " \t\r\n" if newline else " \t"
        while self._peek() and (self._peek() in blank or self._peek() == "#"):
            if self._peek() == "#":
                while self._peek() and self._peek() not in "\r\n":
                    self.at += 1
            else:
                self.at += 1

    def _run(self, chars: frozenset[str]) -> str:
        start = self.at
        while self._peek() and self._peek() in chars:
            self.at += 1
        return self.text[start : self.at]

    def _symbol(self, name: str) -> str:
        self._symbols.add(name)
        if len(self._symbols) > MAX_RULES:
            raise self.fail(self.at, f"more than {MAX_RULES} rules", "make the grammar smaller")
        return name

    def _new_symbol(self) -> str:
        return self._symbol(f" {len(self._symbols)}")  # no written name has a space

    def _rule(self) -> None:
        start = self.at
        name = self._run(_WORD)
        if not name:
            raise self.fail(start, self._what(), "expected the name of a rule (a-z, 0-9, -)")
        if name in self.rules:
            raise self.fail(start, f"the rule {name!r} is defined twice", "keep one of them")
        self._space(newline=False)
        if not self.text.startswith("::=", self.at):
            raise self.fail(self.at, self._what(), f"expected ::= after the name {name!r}")
        self.at += 3
        self._space(newline=True)
        self._symbol(name)
        self.rules[name] = _Rule(start)
        self._alternatives(self.rules[name], is_nested=False)
        if self._peek() and self._peek() not in "\r\n":
            raise self.fail(self.at, self._what(), "expected an item, | or the end of the line")
        self._space(newline=True)

    def _alternatives(self, rule: _Rule, *, is_nested: bool) -> None:
        rule.alternatives.append(self._sequence(is_nested))
        while self._peek() == "|":
            self.at += 1
            self._space(newline=True)
            rule.alternatives.append(self._sequence(is_nested))

    def _sequence(self, is_nested: bool) -> list[str | None]:
        done: list[str | None] = []
        last: list[str | None] = []  # what a repetition repeats
        n_rules = 1
        while char := self._peek():
            if char in "*+?{":
                at = self.at
                low, high = self._bounds(is_nested)
                if not last:
                    raise self.fail(at, f"found {char!r}", "expected an item before it")
                n_rules *= high or low or 1
                if n_rules > MAX_REPEAT:
                    raise self.fail(
                        at, f"{n_rules} repetitions", f"expected at most {MAX_REPEAT} in all"
                    )
                last = self._repeated(last, low, high, at)
                continue
            if char == "(":
                done, last, n_rules = [*done, *last], *self._group()
            elif char == '"':
                done, last, n_rules = [*done, *last], self._literal(), 1
            elif char == "[":
                self._char_class()
                done, last, n_rules = [*done, *last], [None], 1
            elif char == ".":
                self.at += 1
                done, last, n_rules = [*done, *last], [None], 1
            elif char in _WORD:
                done, last, n_rules = [*done, *last], [self._reference()], 1
            elif char in "<!":
                raise self.fail(self.at, f"found {char!r}", "tokens in grammars are not supported")
            else:
                break
            self._space(newline=is_nested)
        return [*done, *last]

    def _reference(self) -> str:
        start = self.at
        name = self._symbol(self._run(_WORD))
        self.references.setdefault(name, start)
        return name

    def _group(self) -> tuple[list[str | None], int]:
        start, n_before = self.at, len(self._symbols)
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise self.fail(start, f"more than {MAX_DEPTH} groups in each other", "name some")
        self.at += 1
        self._space(newline=True)
        name = self._new_symbol()
        rule = self.rules[name] = _Rule(start)
        self._alternatives(rule, is_nested=True)
        if self._peek() != ")":
            raise self.fail(self.at, self._what(), "expected an item, | or )")
        self.at += 1
        self._depth -= 1
        return [name], max(1, len(self._symbols) - n_before)

    def _literal(self) -> list[str | None]:
        start = self.at
        self.at += 1
        chars: list[str | None] = []
        while self._peek() != '"':
            if not self._peek():
                raise self.fail(start, 'a " is not closed', 'add "')
            self._char()
            chars.append(None)
        self.at += 1
        return chars

    def _char_class(self) -> None:
        start = self.at
        self.at += 2 if self.text.startswith("[^", self.at) else 1
        if self._peek() == "]":
            raise self.fail(start, "a class of no characters", "expected at least one")
        while self._peek() != "]":
            if not self._peek():
                raise self.fail(start, "a [ is not closed", "add ]")
            self._char()
            if self._peek() == "-" and not self.text.startswith("-]", self.at):
                self.at += 1
                if self._peek():
                    self._char()
        self.at += 1

    def _char(self) -> None:
        start = self.at
        self.at += 1
        if self.text[start] != "\\":
            return
        kind = self._peek()
        self.at += 1
        if kind in _N_HEX:
            digits = self.text[self.at : self.at + _N_HEX[kind]]
            if len(digits) < _N_HEX[kind] or not _HEX.issuperset(digits):
                raise self.fail(start, f"\\{kind}", f"expected {_N_HEX[kind]} hex digits after it")
            self.at += _N_HEX[kind]
        elif not kind or kind not in _ESCAPED:
            known = 't r n \\ " [ ] - x u U'
            raise self.fail(start, f"the escape \\{kind}", f"expected \\ and one of {known}")

    def _bounds(self, is_nested: bool) -> tuple[int, int | None]:
        """Least and most repetitions that the sign here asks for; None is without end."""
        start, char = self.at, self._peek()
        self.at += 1
        self._space(newline=is_nested)
        if char != "{":
            return {"*": (0, None), "+": (1, None), "?": (0, 1)}[char]
        digits = self._run(_DIGITS)
        if not digits:
            raise self.fail(self.at, self._what(), "expected a number, as in {2} or {2,5}")
        low = self._count(start, digits)
        high: int | None = low
        self._space(newline=is_nested)
        if self._peek() == ",":
            self.at += 1
            self._space(newline=is_nested)
            digits = self._run(_DIGITS)
            high = self._count(start, digits) if digits else None
            self._space(newline=is_nested)
        if self._peek() != "}":
            raise self.fail(self.at, self._what(), "expected , or }")
        self.at += 1
        self._space(newline=is_nested)
        if high is not None and high < low:
            raise self.fail(start, f"at least {low} and at most {high}", "expected least <= most")
        return low, high

    def _count(self, at: int, digits: str) -> int:
        if len(digits) > 9 or int(digits) > MAX_REPEAT:
            raise self.fail(at, f"{digits[:20]} repetitions", f"expected at most {MAX_REPEAT}")
        return int(digits)

    def _repeated(
        self, item: list[str | None], low: int, high: int | None, at: int
    ) -> list[str | None]:
        n_new = 1 if high is None else high - low
        name = ""
        for _ in range(n_new):
            name = self._new_symbol()
        if not name:
            return item if low else []
        is_endless = high is None
        tail = [*item, name] if is_endless else item
        self.rules[name] = _Rule(at, [tail], is_optional=True)
        return [*(item if low else ()), name]


def _leading(rule: _Rule, can_be_empty: set[str]) -> Iterator[str]:
    """Rules that a rule may begin with."""
    for alternative in rule.alternatives:
        for item in alternative:
            if item is None:
                break
            yield item
            if item not in can_be_empty:
                break


def _rules_that_can_be_empty(rules: dict[str, _Rule]) -> set[str]:
    used_by: dict[str, list[str]] = {}
    for name, rule in rules.items():
        for alternative in rule.alternatives:
            for item in alternative:
                if item is not None:
                    used_by.setdefault(item, []).append(name)
    empty: set[str] = set()
    todo = list(rules)
    while todo:
        name = todo.pop()
        rule = rules[name]
        if name not in empty and (
            rule.is_optional
            or any(all(item in empty for item in each) for each in rule.alternatives)
        ):
            empty.add(name)
            todo += used_by.get(name, ())
    return empty


def _check_left_recursion(parser: _Parser) -> None:
    """Refuse a rule that may begin with itself, which the library would follow without end."""
    rules = parser.rules
    empty = _rules_that_can_be_empty(rules)
    steps: dict[str, int] = {}
    open_rules: set[str] = set()
    for start in rules:
        stack = [start]
        while stack:
            name = stack[-1]
            if name in steps:
                stack.pop()
                continue
            leading = list(_leading(rules[name], empty))
            if name in open_rules:
                steps[name] = 1 + sum(steps[item] for item in leading)
                open_rules.discard(name)
                stack.pop()
                if steps[name] > MAX_STEPS:
                    raise parser.fail(
                        rules[name].at, "too many ways to begin", "make the grammar simpler"
                    )
                continue
            open_rules.add(name)
            for item in leading:
                if item in open_rules:
                    raise parser.fail(
                        rules[item].at,
                        "what begins here can begin with itself (left recursion)",
                        "write the repetition with * or +, over what is not empty",
                    )
            stack += [item for item in leading if item not in steps]
