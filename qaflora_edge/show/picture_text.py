"""Text in pictures: what may not stand there is spelt out, and what is too long is cut."""

import unicodedata
from bisect import bisect
from collections.abc import Callable

# They turn the direction of what follows: "\u202etxt.exe" would read as "exe.txt".
_TURNING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_WIDE_LATIN = frozenset("MWmw@%—…")
CHARS_MAX = 2000  # of a label that are looked at: no picture has room for more


def spelt(text: str) -> str:
    """A text in which control characters and those that turn its direction are spelt as escapes.

    Tabs and line ends stay; so do marks inside words, such as the joiners of emoji.
    """
    if text.isprintable():  # neither is
        return text
    return "".join(
        ascii(char)[1:-1] if char in _TURNING or _is_control(char) else char for char in text
    )


def _is_control(char: str) -> bool:
    if char in "\t\n":
        return False
    # Surrogates and U+FFFE are no text, and XML has no way to write them.
    return unicodedata.category(char) in ("Cc", "Cs") or ord(char) & 0xFFFE == 0xFFFE


def beginning(text: str) -> str:
    """The beginning of a text on one line, spelt."""
    return spelt(" ".join(text[: 2 * CHARS_MAX].split()))[:CHARS_MAX]


def crop(text: str, width: float, measure: Callable[[str], float] = len) -> str:
    """A text on one line, cut with a sign where it is wider than `width`.

    measure  the width of a text; it may not shrink when the text grows
    """
    return wrap(text, width, measure, n_line=1)[0]


def wrap(text: str, width: float, measure: Callable[[str], float], *, n_line: int) -> list[str]:
    """A text in at most `n_line` lines, cut with a sign where it is longer.

    A line ends at a space where there is one, else anywhere, as Chinese does.
    """
    rest = beginning(text)
    lines: list[str] = []
    while measure(rest) > width:
        if len(lines) == n_line - 1:
            n_char = _n_fitting(rest, lambda part: measure(f"{part}…") > width)
            return [*lines, f"{rest[:n_char].rstrip()}…"]
        n_char = _n_fitting(rest, lambda part: measure(part) > width)
        at = rest.rfind(" ", 0, n_char + 1)
        n_char = at if at > n_char // 2 else max(1, n_char)
        lines.append(rest[:n_char].rstrip())
        rest = rest[n_char:].lstrip()
    return [*lines, rest]


def _n_fitting(text: str, is_too_wide: Callable[[str], bool]) -> int:
    """The most characters from the start that fit."""
    return bisect(range(1, len(text) + 1), False, key=lambda n: is_too_wide(text[:n]))


def len_pixels(text: str) -> float:
    """About how wide a text is at 13 pixels in a sans-serif font, on the wide side."""
    from rich.cells import cell_len

    def width(char: str) -> float:
        if (n_column := cell_len(char)) != 1:
            return 13.5 * n_column / 2
        if char in _WIDE_LATIN:
            return 13.0
        return 9.5 if char.isupper() else 7.5

    return sum(map(width, text))
