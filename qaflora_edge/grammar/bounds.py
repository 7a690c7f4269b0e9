"""The bounds that a JSON schema sets to a number, and the grammar of what lies between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from typing import Any

from qaflora_edge.errors import GrammarError
from qaflora_edge.grammar.fraction_range import fraction_range
from qaflora_edge.grammar.integer_range import integer_range
from qaflora_edge.grammar.json_values import is_of
from qaflora_edge.grammar.number_range import number_range

MAX_BOUND = 10**15
MAX_DIGITS = 15  # that every float64 keeps
Fail = Callable[[str, str], GrammarError]


@dataclass(frozen=True)
class Bounds:
    """Least and most, None without one, and whether each of them is out itself."""

    low: Decimal | None
    is_above: bool
    high: Decimal | None
    is_below: bool


def read_bounds(schema: Mapping[str, Any], fail: Fail) -> Bounds:
    """The bounds of a schema; what is wider than MAX_BOUND is cut. Raises GrammarError."""
    low, is_above = max(_bound(schema, "Minimum", fail), default=(None, False))
    high, is_below = min(
        _bound(schema, "Maximum", fail),
        key=lambda bound: (bound[0], not bound[1]),
        default=(None, False),
    )
    if low is not None and low < -MAX_BOUND:
        low, is_above = Decimal(-MAX_BOUND), False
    if high is not None and high > MAX_BOUND:
        high, is_below = Decimal(MAX_BOUND), False
    for value in (low, high):
        if value is not None and abs(value) > MAX_BOUND:
            raise fail(f"the bound {value!s:.60}", f"expected one within ±{MAX_BOUND}")
    return Bounds(low, is_above, high, is_below)


def _bound(schema: Mapping[str, Any], name: str, fail: Fail) -> list[tuple[Decimal, bool]]:
    bounds = []
    for key, is_out in ((name.lower(), False), (f"exclusive{name}", True)):
        if key in schema:
            value = schema[key]
            if not is_of(value, "number") or abs(value) == float("inf") or value != value:
                raise fail(f"{key!r} is {value!r:.60}", "expected a number")
            # The shortest text of a float; an integer may be too long for one.
            exact = Decimal(value if isinstance(value, int) else repr(value))
            bounds.append((exact, is_out))
    return bounds


def integer_rule(bounds: Bounds, fail: Fail) -> str:
    """Integers within the bounds, as a GBNF expression."""
    low, high = bounds.low, bounds.high
    if low is None and high is None:
        return "integer"
    first = last = None
    if low is not None:
        first = int(low.to_integral_value(ROUND_CEILING))
        first += bounds.is_above and first == low
    if high is not None:
        last = int(high.to_integral_value(ROUND_FLOOR))
        last -= bounds.is_below and last == high
    if first is not None and last is not None and first > last:
        raise fail(f"no integer lies from {first} to {last}", "widen the range")
    return integer_range(first, last)


def number_rule(bounds: Bounds, fail: Fail) -> str:
    """Numbers within the bounds, as a GBNF expression."""
    low, high = bounds.low, bounds.high
    outs = {"is_above": bounds.is_above, "is_below": bounds.is_below}
    if low is None and high is None:
        return "number"
    if (
        low is not None
        and high is not None
        and (low > high or (low == high and any(outs.values())))
    ):
        raise fail(f"no number lies between {low} and {high}", "widen the range")
    given = [bound for bound in (low, high) if bound is not None]
    n_digit = max(_n_digit(bound) for bound in given)
    if n_digit == 0:
        whole = [None if bound is None else int(bound) for bound in (low, high)]
        return number_range(*whole, **outs)
    n_fraction = MAX_DIGITS - max(len(str(abs(int(bound)))) for bound in given)
    if n_digit >= n_fraction:
        raise fail(
            f"bounds of more than {MAX_DIGITS - 1} digits ({', '.join(map(str, given))})",
            "round them",
        )
    return fraction_range(low, high, n_digit, n_fraction, **outs)


def _n_digit(bound: Decimal) -> int:
    """Digits behind the point."""
    exponent = bound.normalize().as_tuple().exponent
    return max(0, -exponent) if isinstance(exponent, int) else 0
