"""The number that an answer ends with, as people of many languages write numbers."""

import re
import unicodedata
from collections.abc import Iterator
from decimal import Decimal

_GROUP = ",.'’٬ \u00a0\u2009\u202f"  # between thousands, somewhere in the world
_CURRENCY = "$€£¥₽₹"
_MINUS = "-−–"
_DIGITS = rf"\d+([{_GROUP}]\d+)*([eE][+-]?\d{{1,3}}(?!\w))?"
# Digits with separators in between, or a point before all; a minus after a word is a hyphen.
_TOKEN = re.compile(
    rf"((?<!\w)(?P<minus>[{_MINUS}]))?([{_CURRENCY}][ \u00a0]?)?"
    rf"(?P<digits>{_DIGITS}|(?<![\w.,])\.{_DIGITS})"
)
# `#### 12 eggs`, and not the heading `#### 1. Count the eggs`.
_ALONE = rf"[{_MINUS}]?[{_CURRENCY}]?[ \t]?(?>{_DIGITS})[ \t%{_CURRENCY}]*+[^\W\d]*+\.?[ \t]*+$"
_MARK = re.compile(rf"\\boxed\s*\{{|####[ \t]*+(?={_ALONE})", re.MULTILINE)
_SPACES = re.compile(r"[ \u00a0\u2009\u202f]")
_LONGEST = 100  # digits and separators of a number; what is longer is none


def last_number(answer: str) -> frozenset[Decimal]:
    """The values that the last number of an answer may stand for; none where it has no number.

    It is the first one in the last `\\boxed{}`, or behind `####` where the line has little else.
    Digits are those of any script. What may be thousands or decimals, as 1.234, stands for both;
    so may 100 200 for two numbers.
    """
    text = _plain(answer)
    marks = list(_MARK.finditer(text))
    if marks:
        first = next(_numbers(text[marks[-1].end() :]), None)
        if first is not None:
            return first
    found: frozenset[Decimal] = frozenset()
    for found in _numbers(text):  # noqa: B007
        pass
    return found


def is_number(answer: str, expected: Decimal) -> bool:
    """Tell whether an answer ends with a number."""
    return expected in last_number(answer)


def as_number(value: object) -> Decimal | None:
    """A JSON number, or a text that is one number and nothing else; None for anything else.

    A text may have commas between thousands, and a point before decimals.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    text = repr(value) if isinstance(value, float) else str(value)
    whole, point, rest = text.strip().partition(".")
    text = (whole.replace(",", "") if _is_grouped(whole.lstrip("+-")) else whole) + point + rest
    if not re.fullmatch(r"[+-]?\d{1,100}(\.\d{1,100})?([eE][+-]?\d{1,3})?", text, re.ASCII):
        return None
    return Decimal(text)


def _plain(text: str) -> str:
    """Digits and signs of all scripts as those of ASCII; what only LaTeX needs is left out."""
    text = text.translate({0x66B: ".", 0xFF0E: ".", 0xFF0C: ",", 0xFF0D: "-"})
    text = text.replace("{,}", ",").replace("\\,", "\u2009").replace("\\!", "").replace("\\$", "$")
    if text.isascii():
        return text
    return "".join(str(unicodedata.decimal(sign)) if sign.isdecimal() else sign for sign in text)


def _numbers(text: str) -> Iterator[frozenset[Decimal]]:
    """What each number in a text may stand for."""
    for match in _TOKEN.finditer(text):
        digits = match["digits"]
        if len(digits) > _LONGEST:  # numbers with spaces between them, perhaps
            digits = _SPACES.split(digits)[-1]
        if len(digits) > _LONGEST:
            continue
        values = _readings(digits)
        yield frozenset(-value for value in values) if match["minus"] else frozenset(values)


def _readings(token: str) -> set[Decimal]:
    """What digits with separators in between may stand for."""
    if _SPACES.search(token):
        *_, last = _SPACES.split(token)
        spaced = _SPACES.sub(" ", token)
        is_grouped = re.fullmatch(r"\d{1,3}( \d{3})+([,.]\d+)?", spaced)
        return _readings(last) | (_readings(spaced.replace(" ", "")) if is_grouped else set())
    token = re.sub(r"(?<=\d)['’٬](?=\d{3})", "", token)
    token = re.split("['’٬]", token)[-1]
    mantissa, sign, exponent = token.lower().partition("e")
    return {Decimal(each + sign + exponent) for each in _decimals(mantissa)}


def _decimals(token: str) -> set[str]:
    """Digits with points and commas, as decimal numbers with a point."""
    separators = re.findall("[.,]", token)
    if not separators:
        return {token}
    last = separators[-1]
    head, _, tail = token.rpartition(last)
    if len(set(separators)) == 2:
        if separators.count(last) == 1 and _is_grouped(head):  # 1,234.50 and 1.234,50
            return {f"{re.sub('[.,]', '', head)}.{tail}"}
        return _decimals(token.rpartition("," if last == "." else ".")[2])  # a list
    if len(separators) > 1:  # 1,234,567, or a list
        return {token.replace(last, "")} if _is_grouped(token) else {tail}
    decimal = set() if last == "," and tail == "000" else {f"{head}.{tail}"}
    whole = {head + tail} if _is_grouped(token) else set()
    return decimal | whole or {tail}


def _is_grouped(token: str) -> bool:
    """Whether separators stand at thousands, or as India writes them."""
    return re.fullmatch(r"[1-9]\d{0,2}([.,]\d{3})+|[1-9]\d?([.,]\d\d)*[.,]\d{3}", token) is not None
