r"""A schema's `pattern`, from ECMA-262's notation of regular expressions to llguidance's.

llguidance reads Rust's notation, in which `[a&&b]`, `(?i)`, `\A` and `\x{41}` mean something else
than in ECMA-262 or Python. So every sign is read here and written out again. Where ECMA-262 and
Python differ (`\W`, `\s`, `.`), what is written fits both.
"""

from collections.abc import Callable
from typing import NoReturn

from qaflora_edge.errors import GrammarError

MAX_LENGTH, MAX_DEPTH, MAX_REPEAT = 4096, 40, 1000
Fail = Callable[[str, str], GrammarError]

_ANY = r"[^\n\r\x{2028}\x{2029}]"
_SPACE = r"\t-\r \x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}"
_SPACES = rf"{_SPACE}\x{{1c}}-\x{{1f}}\x{{85}}\x{{feff}}"
# Of each shorthand what is surely in it, and what may be, as items of a class.
_SHORTHANDS = {
    "d": ("0-9", r"\p{Nd}"),
    "D": (r"\P{Nd}", "[^0-9]"),
    "w": ("0-9A-Za-z_", r"\p{L}\p{M}\p{N}_"),
    "W": (r"[^\p{L}\p{M}\p{N}_]", "[^0-9A-Za-z_]"),
    "s": (_SPACE, _SPACES),
    "S": (f"[^{_SPACES}]", f"[^{_SPACE}]"),
}
_BEFORE = "^(?s:.{0,50})"  # what has no ^: not endless, for a base may never come to the point
_SIGNS = {"n": 0x0A, "r": 0x0D, "t": 0x09, "f": 0x0C, "v": 0x0B, "0": 0}
_N_HEX, _HEX = {"x": 2, "u": 4}, frozenset("0123456789abcdefABCDEF")
_AROUND = {"=": "lookahead", "!": "lookahead", "<=": "lookbehind", "<!": "lookbehind"}
_KINDS = {"b": "a word boundary", "B": "a word boundary", "k": "a back-reference"}
_KINDS |= {"p": "a Unicode property", "P": "a Unicode property"}
_KINDS |= dict.fromkeys("0123456789", "a back-reference")


def read_pattern(pattern: str, fail: Fail) -> str:
    """The same regular expression in Rust's notation.

    fail  makes the error of what was found, and of advice

    Raises GrammarError for what is no such pattern, or looks around or back.
    """
    return _Reader(pattern, fail).read()


class _Reader:
    def __init__(self, text: str, fail: Fail) -> None:
        self.text, self.at, self._fail = text, 0, fail

    def _refuse(self, found: str, advice: str, at: int | None = None) -> NoReturn:
        place = self.at if at is None else at
        raise self._fail(f"'pattern' has {found} at character {place}", advice)

    def _take(self, text: str) -> bool:
        is_there = self.text.startswith(text, self.at)
        self.at += len(text) * is_there
        return is_there

    def read(self) -> str:
        if len(self.text) > MAX_LENGTH:
            self._refuse(f"{len(self.text)} characters", f"expected at most {MAX_LENGTH}")
        parts: list[str] = []
        groups: list[int] = []  # where each open one begins
        can_repeat = False
        while self.at < len(self.text):
            start, char = self.at, self.text[self.at]
            is_first = not parts or parts[-1] in ("|", "(?:")
            if is_first and not groups and char != "^":
                parts.append(_BEFORE)
            if char in "*+?{":
                if not can_repeat:
                    self._refuse(
                        f"{char} behind nothing that it repeats", rf"write \{char} for the sign"
                    )
                parts.append(self._repetition())
                can_repeat = False
                continue
            self.at += 1
            can_repeat = char not in "^$|("
            if char == "(":
                self._check_group(start)
                groups.append(start)
                if len(groups) > MAX_DEPTH:
                    self._refuse(f"more than {MAX_DEPTH} groups in each other", "make it simpler")
                parts.append("(?:")
            elif char == ")":
                if not groups:
                    self._refuse("a ) without its (", r"write \) for the sign", start)
                groups.pop()
                parts.append(char)
            elif char in "^$|":
                if char == "^" and not is_first:
                    self._refuse(
                        "^ inside", r"write it at the beginning, or \^ for the sign", start
                    )
                if char == "$" and self.text[self.at : self.at + 1] not in ("", "|", ")"):
                    self._refuse("$ inside", r"write it at the end, or \$ for the sign", start)
                parts.append(char)
            else:
                parts.append(self._atom(char))
        if groups:
            self._refuse("a ( that is not closed", "add )", groups[-1])
        return "".join(parts)

    def _check_group(self, start: int) -> None:
        if self._take("?") and not self._take(":"):
            rest = self.text[self.at : self.at + 2]
            kind = next((word for sign, word in _AROUND.items() if rest.startswith(sign)), "")
            self._refuse(f"a {kind}" if kind else f"(?{rest[:1]}", "expected ( or (?:", start)

    def _atom(self, char: str) -> str:
        if char == ".":
            return _ANY
        if char == "[":
            return self._class()
        if char == "\\":
            found = self._escape(in_class=False)
            return _written(found) if isinstance(found, int) else f"[{found[0]}]"
        return _written(ord(char))

    def _repetition(self) -> str:
        """A sign of repetition; which match a lazy one finds does not matter here."""
        start = self.at
        self.at += 1
        sign = self.text[start]
        if sign == "{":
            low = high = self._number(start)
            sign = f"{{{low}}}"
            if self._take(","):
                is_open = self.text.startswith("}", self.at)
                high = low if is_open else self._number(start)
                sign = f"{{{low},{'' if is_open else high}}}"
            if not self._take("}") or high < low:
                self._refuse("a { that is no repetition", r"write {2}, {2,} or {2,5}, or \{", start)
        self._take("?")
        return sign

    def _number(self, start: int) -> int:
        digits = ""
        while self.at < len(self.text) and self.text[self.at] in "0123456789":
            digits += self.text[self.at]
            self.at += 1
        if not digits or len(digits) > 9 or int(digits) > MAX_REPEAT:
            self._refuse("a { without a number", f"expected one up to {MAX_REPEAT}, or \\{{", start)
        return int(digits)

    def _class(self) -> str:
        start = self.at - 1
        is_negated = self._take("^")
        items: list[str] = []
        while not self._take("]"):
            first = self._class_item(start)
            if isinstance(first, tuple):
                items.append(first[is_negated])
                continue
            items.append(_written(first))
            if self.text.startswith("-", self.at) and self.text[self.at + 1 : self.at + 2] != "]":
                self.at += 1
                end = self._class_item(start)
                if isinstance(end, tuple) or end < first:
                    self._refuse(
                        "a class with a range that has no end", r"write \- for the sign", start
                    )
                items.append(f"-{_written(end)}")
        if not items:
            self._refuse("a class of no characters", "expected at least one", start)
        return f"[{'^' * is_negated}{''.join(items)}]"

    def _class_item(self, start: int) -> int | tuple[str, str]:
        if self.at >= len(self.text):
            self._refuse("a [ that is not closed", "add ]", start)
        self.at += 1
        if self.text[self.at - 1] == "\\":
            return self._escape(in_class=True)
        return ord(self.text[self.at - 1])

    def _escape(self, *, in_class: bool) -> int | tuple[str, str]:
        """A code point, or the two sets of a shorthand, behind a backslash."""
        start, char = self.at - 1, self.text[self.at : self.at + 1]
        self.at += 1
        if char in _SHORTHANDS:
            return _SHORTHANDS[char]
        if char in _SIGNS and not (char == "0" and self.text[self.at : self.at + 1].isdigit()):
            return _SIGNS[char]
        if char == "b" and in_class:
            return 0x08
        if char in _N_HEX:
            return self._hex(start, char)
        if char and not (char.isalnum() or char == "_"):
            return ord(char)
        self._refuse(f"{_KINDS.get(char, 'the escape')} \\{char}", "write it without", start)

    def _hex(self, start: int, kind: str) -> int:
        n_digit = _N_HEX[kind]
        is_braced = kind == "u" and self._take("{")
        if is_braced:
            n_digit = max(0, self.text.find("}", self.at) - self.at)
        digits = self.text[self.at : self.at + n_digit]
        is_hex = 0 < len(digits) == n_digit <= 6 and set(digits) <= _HEX
        code = int(digits, 16) if is_hex else -1
        if not 0 <= code <= 0x10FFFF or 0xD800 <= code <= 0xDFFF:
            self._refuse(f"the escape \\{kind}", "write the character itself", start)
        self.at += n_digit + is_braced
        return code


def _written(code: int) -> str:
    """A character as Rust reads it, inside a class and outside."""
    char = chr(code)
    return char if char.isascii() and char.isalnum() else rf"\x{{{code:x}}}"
