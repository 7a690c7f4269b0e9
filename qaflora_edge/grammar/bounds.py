"""The bounds that a JSON schema sets to numbers, in the words of which llguidance keeps to all.

llguidance reads bounds as float64, and lets a whole number n through where exclusiveMinimum is n
and the maximum lies below n + 1 (version 1.9.1, numeric.rs rx_float_range). So bounds are short
enough to be exact, and a whole one that is out itself becomes the next number that is in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from decimal import Decimal
from math import lcm
from typing import Any

from qaflora_edge.errors import GrammarError
from qaflora_edge.grammar.json_values import is_of

MAX_BOUND = 10**15
MAX_DIGITS = 15  # that every float64 keeps
MAX_MULTIPLES = 2**32 - 1  # llguidance multiplies in uint32: numeric.rs Decimal::lcm
Fail = Callable[[str, str], GrammarError]


def checked_bounds(schema: Mapping[str, Any], fail: Fail) -> dict[str, int | float]:
    """The bounds of a schema; what is wider than MAX_BOUND is cut. Raises GrammarError."""
    bounds: dict[str, int | float] = {}
    for key in ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum"):
        if key not in schema:
            continue
        value, sign = _exact(key, schema[key], fail), 1 if key.endswith("inimum") else -1
        if sign * value < -MAX_BOUND:
            value = Decimal(-sign * MAX_BOUND)
        if abs(value) > MAX_BOUND:
            raise fail(f"the bound {value!s:.60}", f"expected one within ±{MAX_BOUND}")
        if value % 1 and len(str(abs(int(value)))) + _n_fraction(value) >= MAX_DIGITS:
            raise fail(f"a bound of more than {MAX_DIGITS - 1} digits ({value!s:.60})", "round it")
        if key.startswith("exclusive") and sign * value >= 0 and value % 1 == 0:
            value += sign * Decimal(1).scaleb(min(0, len(str(abs(int(value)))) - MAX_DIGITS))
            key = "minimum" if sign > 0 else "maximum"
            bounds[key] = max(sign * _plain(value), sign * bounds.get(key, _plain(value))) * sign
        else:
            bounds[key] = _plain(value)
    return bounds


def checked_multiple(value: Any, fail: Fail) -> Decimal:
    """`multipleOf` of a schema. Raises GrammarError."""
    exact = _exact("multipleOf", value, fail)
    if exact <= 0:
        raise fail(f"'multipleOf' is {value!r:.60}", "expected a number above 0")
    return exact


def are_few_multiples(multiples: set[Decimal]) -> bool:
    """Whether llguidance can find their common multiples, in whatever way they meet."""
    n_fraction = max(map(_n_fraction, multiples), default=0)
    whole = [int(each.scaleb(n_fraction)) for each in multiples]
    return lcm(*whole) * max(whole, default=0) <= MAX_MULTIPLES


def is_exact(value: float) -> bool:
    """Whether llguidance's reader of JSON gives a finite number as it is, not one beside it."""
    if isinstance(value, int) and abs(value) <= 2**53:
        return True
    _, digits, exponent = _decimal(value).normalize().as_tuple()
    return isinstance(exponent, int) and len(digits) <= MAX_DIGITS and abs(exponent) <= 22


def _n_fraction(value: Decimal) -> int:
    """Digits behind the point."""
    exponent = value.normalize().as_tuple().exponent
    return max(0, -exponent) if isinstance(exponent, int) else 0


def _decimal(value: float) -> Decimal:
    """The shortest text of a float; an integer may be too long for one."""
    return Decimal(value if isinstance(value, int) else repr(value))


def _exact(key: str, value: Any, fail: Fail) -> Decimal:
    if not is_of(value, "number") or abs(value) == float("inf") or value != value:
        raise fail(f"{key!r} is {value!r:.60}", "expected a number")
    return _decimal(value)


def _plain(value: Decimal) -> int | float:
    return int(value) if value % 1 == 0 else float(value)
