"""Decimal numbers between bounds of which one has a fraction, as a GBNF expression."""

from __future__ import annotations

from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal

from qaflora_edge.grammar.integer_range import LARGEST, naturals, same_length


def fraction_range(
    low: Decimal | None,
    high: Decimal | None,
    n_digit: int,
    n_fraction: int,
    *,
    is_above: bool,
    is_below: bool,
) -> str:
    """Numbers from low to high, without exponents; None: no bound. "" if there is none.

    n_digit     digits behind the point that the bounds have
    n_fraction  the most that a number has, more than n_digit; with those before the point at most
                15, so that no number is rounded onto a bound as float64
    is_above, is_below  whether low and high themselves are out
    """
    options = []
    if low is None or low < 0:
        is_reached = high is not None and high < 0
        options += _positives(
            -high if high is not None and is_reached else Decimal(0),
            None if low is None else -low,
            (n_digit, n_fraction),
            is_above=is_below if is_reached else True,
            is_below=is_above,
        )
        options = [f'"-" ({" | ".join(options)})'] if options else []
    if high is None or high >= 0:
        is_reached = low is not None and low >= 0
        options += _positives(
            low if low is not None and is_reached else Decimal(0),
            high,
            (n_digit, n_fraction),
            is_above=is_reached and is_above,
            is_below=is_below,
        )
    return " | ".join(options)


def _positives(
    low: Decimal, high: Decimal | None, digits: tuple[int, int], *, is_above: bool, is_below: bool
) -> list[str]:
    """Alternatives for 0 <= low to high: with fewer digits than the bounds have, and with more."""
    n_digit, n_fraction = digits
    options = []
    for n in range(n_digit):
        first = int((low.scaleb(n)).to_integral_value(ROUND_CEILING))
        first += is_above and first == low.scaleb(n)
        last = None
        if high is not None:
            last = int((high.scaleb(n)).to_integral_value(ROUND_FLOOR))
            last -= is_below and last == high.scaleb(n)
        options += _fixed(first, last, n)
    first, last = int(low.scaleb(n_digit)), None if high is None else int(high.scaleb(n_digit))
    n_more = n_fraction - n_digit
    if is_above:
        if last is None or first < last:
            some = f'"0"{{0,{n_more // 2}}} [1-9] [0-9]{{0,{(n_more - 1) // 2}}}'
            options.append(f"{_fixed(first, first, n_digit)[0]} {some}")
        first += 1
    within = _fixed(first, None if last is None else last - 1, n_digit)
    if within:
        options.append(f"({' | '.join(within)}) [0-9]{{0,{n_more}}}")
    if last is not None and not is_below and first <= last:
        options.append(f'{_fixed(last, last, n_digit)[0]} "0"{{0,{n_more}}}')
    return options


def _fixed(first: int, last: int | None, n: int) -> list[str]:
    """Alternatives for numbers with n digits behind the point, given without the point."""
    unit = 10**n
    last = LARGEST * unit + unit - 1 if last is None else last
    if first > last:
        return []
    if n == 0:
        return [naturals(first, last)]
    (low, low_part), (high, high_part) = divmod(first, unit), divmod(last, unit)
    if low == high:
        return [f'"{low}." ({same_length(f"{low_part:0{n}}", f"{high_part:0{n}}")})']
    options = []
    if low_part:
        options.append(f'"{low}." ({same_length(f"{low_part:0{n}}", "9" * n)})')
        low += 1
    if high_part < unit - 1:
        options.append(f'"{high}." ({same_length("0" * n, f"{high_part:0{n}}")})')
        high -= 1
    if low <= high:
        options.append(f'({naturals(low, high)}) "." [0-9]{{{n}}}')
    return options
