"""Decimal numbers between two whole bounds, as a GBNF expression."""

from __future__ import annotations

from qaflora_edge.grammar.integer_range import LARGEST, naturals


def number_range(
    low: int | None, high: int | None, *, is_above: bool = False, is_below: bool = False
) -> str:
    """Numbers from low to high, without exponents; None: no bound.

    is_above, is_below  whether low and high themselves are out

    Some number lies between the bounds. Fractions are so short that no number is rounded onto a
    bound as float64.
    """
    n_digit = max(len(str(abs(bound or 0))) for bound in (low, high))
    n_fraction = max(1, 15 - n_digit)
    options = []
    if low is None or low < 0:
        is_reached = high is not None and high < 0
        options += _positives(
            -high if high is not None and is_reached else 0,
            None if low is None else -low,
            is_above=is_below if is_reached else True,
            is_below=is_above,
            n_fraction=n_fraction,
        )
        options = [f'"-" ({" | ".join(options)})']
    if high is None or high > 0 or (high == 0 and not is_below):
        is_reached = low is not None and low >= 0
        options += _positives(
            low if low is not None and is_reached else 0,
            high,
            is_above=is_reached and is_above,
            is_below=is_below,
            n_fraction=n_fraction,
        )
    return " | ".join(options)


def _positives(
    low: int, high: int | None, *, is_above: bool, is_below: bool, n_fraction: int
) -> list[str]:
    """Alternatives for 0 <= low to high."""
    options = []
    first = low
    if is_above and (high is None or low < high):
        first = low + 1
        some = f'"0"{{0,{n_fraction // 2}}} [1-9] [0-9]{{0,{(n_fraction - 1) // 2}}}'
        options.append(f'"{low}." {some}')
    last = LARGEST if high is None else high - 1
    if first <= last:
        options.append(f'({naturals(first, last)}) ("." [0-9]{{1,{n_fraction}}})?')
    if high is not None and not is_below and (low < high or not is_above):
        options.append(f'"{high}" ("." "0"{{1,{n_fraction}}})?')
    return options
