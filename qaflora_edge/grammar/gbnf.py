"""GBNF, llama.cpp's notation for grammars, put into Lark's, which llguidance reads.

The text is read as llama.cpp's parser does (0c1e5709, llama-grammar.cpp llama_grammar_parser),
and errors have their place. llguidance takes the longest terminal that it can, and GBNF knows
none: so a grammar becomes one terminal as a whole, whose masks cost microseconds, or, where a rule
needs itself, every character becomes one.
"""

import re
from graphlib import CycleError, TopologicalSorter

from qaflora_edge.errors import GrammarError

ROOT = "root"
MAX_LENGTH = 1 << 20  # characters
MAX_DEPTH = 64  # groups in groups
MAX_REPEAT = 2000
MAX_CHAIN = 1000  # rules and groups on a way; 5000 overflow llguidance's stack

_WORD = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-")
_DIGITS = frozenset("0123456789")
_HEX = frozenset("0123456789abcdefABCDEF")
_ESCAPED = {"t": "\t", "r": "\r", "n": "\n", **{char: char for char in '\\"[]-'}}
_N_HEX = {"x": 2, "u": 4, "U": 8}
_EMPTY = '""'


def gbnf_to_lark(text: str, *, source: str = "The grammar") -> str:
    """The same grammar for llguidance.

    source  how messages call the grammar, such as "The grammar list.gbnf"

    Raises GrammarError with line and column.
    """
    if len(text) > MAX_LENGTH:
        raise GrammarError(
            f"{source} has {len(text)} characters, expected at most {MAX_LENGTH}; make it smaller."
        )
    return _Parser(text, source).parse()


class _Parser:
    """One pass over the text; methods give what they read in Lark's notation."""

    def __init__(self, text: str, source: str) -> None:
        self.text, self.source, self.at = text, source, 0
        self._rules: dict[str, str] = {}
        self._references: dict[str, int] = {}  # name -> where it is first used
        self._names: dict[str, str] = {}
        self._uses: dict[str, dict[str, None]] = {}  # name -> names in its rule
        self._used: dict[str, None] = {}  # by the rule that is read
        self._nested: dict[str, int] = {}  # name -> groups in each other in its rule
        self._depth = 0

    def fail(self, at: int, found: str, advice: str) -> GrammarError:
        line = self.text.count("\n", 0, at) + 1
        column = at - self.text.rfind("\n", 0, at)
        return GrammarError(f"{self.source}, line {line}, column {column}: {found}; {advice}.")

    def parse(self) -> str:
        for at, char in enumerate(self.text):
            if char == "\0" or "\ud800" <= char <= "\udfff":
                raise self.fail(at, f"found {char!r}", "expected text that UTF-8 can write")
        self._space(newline=True)
        while self.at < len(self.text):
            self._rule()
        for name, at in self._references.items():
            if name not in self._rules:
                raise self.fail(at, f"the rule {name!r} is not defined", f"add {name} ::= ...")
        if ROOT not in self._rules:
            raise self.fail(0, f"there is no rule {ROOT!r}", f"add {ROOT} ::= ..., the start")
        self._check_chain()
        lark = "".join(f"{self._name(name)}: {rule}\n" for name, rule in self._rules.items())
        lark = f"start: {self._name(ROOT)}\n{lark}"
        return lark if self._is_recursive() else re.sub(r"\br(?=\d)", "R", lark)

    def _check_chain(self) -> None:
        todo, seen = [(name, 0) for name in reversed([ROOT, *self._rules])], set()
        while todo:
            name, depth = todo.pop()
            if name in seen:
                continue
            seen.add(name)
            depth += 1 + self._nested[name]
            if depth > MAX_CHAIN:
                raise self.fail(
                    self._references.get(name, 0),
                    f"more than {MAX_CHAIN} rules and groups in each other",
                    "make the grammar simpler",
                )
            todo += [(used, depth) for used in reversed(self._uses[name])]

    def _is_recursive(self) -> bool:
        try:
            TopologicalSorter(self._uses).prepare()
        except CycleError:
            return True
        return False

    def _name(self, name: str) -> str:
        return self._names.setdefault(name, f"r{len(self._names)}")

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

    def _rule(self) -> None:
        start = self.at
        name = self._run(_WORD)
        if not name:
            raise self.fail(start, self._what(), "expected the name of a rule (a-z, 0-9, -)")
        if name in self._rules:
            raise self.fail(start, f"the rule {name!r} is defined twice", "keep one of them")
        self._space(newline=False)
        if not self.text.startswith("::=", self.at):
            raise self.fail(self.at, self._what(), f"expected ::= after the name {name!r}")
        self.at += 3
        self._space(newline=True)
        self._used, self._nested[name] = {}, 0
        self._uses[name] = self._used
        self._rules[name] = self._alternatives(is_nested=False)
        if self._peek() and self._peek() not in "\r\n":
            raise self.fail(self.at, self._what(), "expected an item, | or the end of the line")
        self._space(newline=True)

    def _alternatives(self, *, is_nested: bool) -> str:
        options = [self._sequence(is_nested)]
        while self._peek() == "|":
            self.at += 1
            self._space(newline=True)
            options.append(self._sequence(is_nested))
        return " | ".join(options)

    def _sequence(self, is_nested: bool) -> str:
        items: list[str] = []
        while char := self._peek():
            if char in "*+?{":
                at = self.at
                sign = self._repetition(is_nested)
                if not items or items[-1] == _EMPTY:
                    raise self.fail(at, f"found {char!r}", "expected an item before it")
                # llguidance takes no repetition that is none.
                items[-1] = _EMPTY if sign == "{0,0}" else f"({items[-1]}){sign}"
                continue
            if char == "(":
                items.append(self._group())
            elif char == '"':
                items.append(self._literal())
            elif char == "[":
                items.append(self._char_class())
            elif char == ".":
                self.at += 1
                items.append("/(?s:.)/")
            elif char in _WORD:
                items.append(self._reference())
            elif char in "<!":
                raise self.fail(self.at, f"found {char!r}", "tokens in grammars are not supported")
            else:
                break
            self._space(newline=is_nested)
        return " ".join(items) or _EMPTY

    def _reference(self) -> str:
        start = self.at
        name = self._run(_WORD)
        self._references.setdefault(name, start)
        self._used[name] = None
        return self._name(name)

    def _group(self) -> str:
        start = self.at
        self._depth += 1
        self._nested[next(reversed(self._nested))] += 1
        if self._depth > MAX_DEPTH:
            raise self.fail(start, f"more than {MAX_DEPTH} groups in each other", "name some")
        self.at += 1
        self._space(newline=True)
        options = self._alternatives(is_nested=True)
        if self._peek() != ")":
            raise self.fail(self.at, self._what(), "expected an item, | or )")
        self.at += 1
        self._depth -= 1
        return f"({options})"

    def _literal(self) -> str:
        start = self.at
        self.at += 1
        chars: list[str] = []
        while self._peek() != '"':
            if not self._peek():
                raise self.fail(start, 'a " is not closed', 'add "')
            at, char = self.at, self._char()
            if char == "\0":
                raise self.fail(at, "U+0000", "expected what a base writes")
            chars.append(f"/{_written(char)}/")
        self.at += 1
        return f"({' '.join(chars)})" if chars else _EMPTY

    def _char_class(self) -> str:
        start = self.at
        is_negated = self.text.startswith("[^", self.at)
        self.at += 1 + is_negated
        if self._peek() == "]":
            raise self.fail(start, "a class of no characters", "expected at least one")
        items = ""
        while self._peek() != "]":
            if not self._peek():
                raise self.fail(start, "a [ is not closed", "add ]")
            first = last = self._char()
            if self._peek() == "-" and not self.text.startswith("-]", self.at):
                self.at += 1
                if self._peek():
                    last = self._char()
            if last < first:
                raise self.fail(start, f"the range {first!r} to {last!r}", "expected first <= last")
            items += f"{_written(first)}-{_written(last)}"
        self.at += 1
        return f"/[{'^' * is_negated}{items}]/"

    def _char(self) -> str:
        start = self.at
        self.at += 1
        if self.text[start] != "\\":
            return self.text[start]
        kind = self._peek()
        self.at += 1
        if kind in _N_HEX:
            digits = self.text[self.at : self.at + _N_HEX[kind]]
            if len(digits) < _N_HEX[kind] or not _HEX.issuperset(digits):
                raise self.fail(start, f"\\{kind}", f"expected {_N_HEX[kind]} hex digits after it")
            self.at += _N_HEX[kind]
            code = int(digits, 16)
            if code > 0x10FFFF or 0xD800 <= code <= 0xDFFF:
                raise self.fail(start, f"\\{kind}{digits}", "expected a character of Unicode")
            return chr(code)
        if kind not in _ESCAPED:
            known = 't r n \\ " [ ] - x u U'
            raise self.fail(start, f"the escape \\{kind}", f"expected \\ and one of {known}")
        return _ESCAPED[kind]

    def _repetition(self, is_nested: bool) -> str:
        start, char = self.at, self._peek()
        self.at += 1
        self._space(newline=is_nested)
        if char != "{":
            return char
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
        return f"{{{low},{'' if high is None else high}}}"

    def _count(self, at: int, digits: str) -> int:
        if len(digits) > 9 or int(digits) > MAX_REPEAT:
            raise self.fail(at, f"{digits[:20]} repetitions", f"expected at most {MAX_REPEAT}")
        return int(digits)


def _written(char: str) -> str:
    return rf"\x{{{ord(char):x}}}"
