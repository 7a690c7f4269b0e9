"""Decimal integers between two bounds, as a GBNF expression."""

from __future__ import annotations

_N_DIGIT = 16
LARGEST = 10**_N_DIGIT - 1


def integer_range(low: int | None, high: int | None) -> str:
    """Integers from low to high, both included, without leading zeros; None: 16 digits.

    low <= high where both are given, and both within 16 digits.
    """
    low = -LARGEST if low is None else low
    high = LARGEST if high is None else high
    options = []
    if low < 0:
        magnitudes = naturals(max(1, -high), -low)
        options.append(f'"-" ({magnitudes})')
    if high >= 0:
        options.append(naturals(max(0, low), high))
    return " | ".join(options)


def naturals(low: int, high: int) -> str:
    """Alternatives for low to high, each of one number of digits."""
    options = []
    for n_digit in range(len(str(low)), len(str(high)) + 1):
        least = max(low, 0 if n_digit == 1 else 10 ** (n_digit - 1))
        options.append(same_length(str(least), str(min(high, 10**n_digit - 1))))
    return " | ".join(options)


def same_length(low: str, high: str) -> str:
    """Numbers from low to high of as many digits as both have."""
    if not low:
        return '""'
    if low == "0" * len(low) and high == "9" * len(high):
        return f"[0-9]{{{len(low)}}}"
    if low[0] == high[0]:
        rest = same_length(low[1:], high[1:])
        return f'"{low[0]}"' if rest == '""' else f'"{low[0]}" ({rest})'
    n_rest = len(low) - 1
    first, last = int(low[0]), int(high[0])
    options = []
    if n_rest and low[1:] != "0" * n_rest:
        options.append(f'"{first}" ({same_length(low[1:], "9" * n_rest)})')
        first += 1
    above = None
    if n_rest and high[1:] != "9" * n_rest:
        above = f'"{last}" ({same_length("0" * n_rest, high[1:])})'
        last -= 1
    if first <= last:
        rest = f" [0-9]{{{n_rest}}}" if n_rest else ""
        options.append(f"[{first}-{last}]{rest}")
    if above is not None:
        options.append(above)
    return " | ".join(options)
