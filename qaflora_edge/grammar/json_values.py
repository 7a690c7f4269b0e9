"""JSON values and schemas: types, equality, whether two schemas share a value, or one has any.

Also the bounds and constants of a schema, in words of which llguidance keeps to all.
"""

import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from math import lcm
from typing import Any

from qaflora_edge.errors import GrammarError

MAX_BOUND = 10**15
MAX_DEPTH = 64
MAX_DIGITS = 15  # that every float64 keeps
MAX_MULTIPLES = 2**32 - 1  # llguidance multiplies in uint32: numeric.rs Decimal::lcm
Fail = Callable[[str, str], GrammarError]
# By \u escapes llguidance spells a named property anew, so that its schema is passed by. They are
# switched off, and these have no other spelling.
_UNWRITABLE = re.compile(r"[\x00-\x07\x0b\x0e-\x1f\x7f\ud800-\udfff]")


def is_of(value: Any, kind: str) -> bool:
    """Whether a value is of a JSON schema's type."""
    if kind == "integer":
        return isinstance(value, (int, float)) and not isinstance(value, bool) and value % 1 == 0
    if kind == "number":
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    types: dict[str, type | tuple[type, ...]] = {
        "object": Mapping,
        "array": (list, tuple),
        "string": str,
        "boolean": bool,
        "null": type(None),
    }
    return isinstance(value, types[kind])


def is_same(one: Any, other: Any) -> bool:
    """Equality of JSON values, in which 1 is 1.0 but not true."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(is_same, one, other))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(is_same(one[key], other[key]) for key in one)
    return bool(one == other)


def _values(schema: Any) -> list[Any] | None:
    """The values that alone fit a schema, or None if they are not listed."""
    if isinstance(schema, Mapping):
        if "const" in schema:
            return [schema["const"]]
        if isinstance(schema.get("enum"), list):
            return list(schema["enum"])
    return None


def _types_of(schema: Any) -> set[str]:
    kinds = schema.get("type") if isinstance(schema, Mapping) else None
    found = {kinds} if isinstance(kinds, str) else set(kinds) if isinstance(kinds, list) else set()
    return found | {"integer"} if "number" in found else found


def are_apart(one: Any, other: Any) -> bool:
    """Whether it is plain to see that no value fits both schemas."""
    values, others = _values(one), _values(other)
    if values is not None and others is not None:
        return not any(is_same(a, b) for a in values for b in others)
    kinds, other_kinds = _types_of(one), _types_of(other)
    if kinds and other_kinds and not kinds & other_kinds:
        return True
    if kinds != {"object"} or other_kinds != {"object"}:
        return False
    shared = set(one.get("required", ())) & set(other.get("required", ()))
    return any(
        are_apart(one.get("properties", {}).get(key), other.get("properties", {}).get(key))
        for key in shared
        if _values(one.get("properties", {}).get(key)) is not None
    )


def can_end(definitions: Mapping[str, Any]) -> dict[str, bool]:
    """Whether a value of finite size fits each definition; what is false counts as one that does.

    definitions  schemas by name that refer to each other as #/$defs/NAME
    """
    ending: set[str] = set()
    while True:
        found = {name for name, schema in definitions.items() if _ends(schema, ending)}
        if found == ending:
            return {name: name in ending for name in definitions}
        ending = found


def _ends(schema: Any, ending: set[str]) -> bool:
    if isinstance(schema, bool):
        return True
    if "$ref" in schema and schema["$ref"].removeprefix("#/$defs/") not in ending:
        return False
    if not all(_ends(each, ending) for each in schema.get("allOf", ())):
        return False
    for key in ("anyOf", "oneOf"):
        if key in schema and not any(_ends(each, ending) for each in schema[key]):
            return False
    kinds = schema.get("type", ["null"])
    if set(kinds) - {"object", "array"}:
        return True
    properties, rest = schema.get("properties", {}), schema.get("additionalProperties", True)
    if "object" in kinds and all(
        _ends(properties.get(name, rest), ending) for name in schema.get("required", ())
    ):
        return True
    first, n_item = schema.get("prefixItems", []), schema.get("minItems", 0)
    items = [*first, schema.get("items", True)][:n_item]
    return "array" in kinds and all(_ends(each, ending) for each in items)


def checked_bounds(schema: Mapping[str, Any], fail: Fail) -> dict[str, int | float]:
    """The bounds of a schema; what is wider than MAX_BOUND is cut. Raises GrammarError.

    llguidance reads them as float64, and lets a whole number n through where exclusiveMinimum is n
    and the maximum lies below n + 1 (version 1.9.1, numeric.rs rx_float_range). So bounds are short
    enough to be exact, and a whole one that is out itself becomes the next number that is in.
    """
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


def checked_constant(value: Any, fail: Fail, depth: int = 0) -> Any:
    """A value of `const` or `enum`. Raises GrammarError for what would not be written so."""
    if depth > MAX_DEPTH:
        raise fail(f"a constant of more than {MAX_DEPTH} levels", "flatten it")
    if isinstance(value, (list, tuple)):
        return [checked_constant(each, fail, depth + 1) for each in value]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {
            checked_text(key, fail): checked_constant(each, fail, depth + 1)
            for key, each in value.items()
        }
    if isinstance(value, str):
        return checked_text(value, fail)
    if value is None or isinstance(value, bool):
        return value
    if is_of(value, "number") and abs(value) < 1e300:  # neither NaN nor infinite
        if not is_exact(value):
            raise fail(f"the constant {short(value)} has more than 15 digits", "round it")
        return value
    raise fail(f"the constant {short(value)}", "expected a JSON value")


def checked_text(text: str, fail: Fail) -> str:
    """A text that is written as a string or name. Raises GrammarError."""
    found = _UNWRITABLE.search(text)
    if found:
        raise fail(f"the character {found[0]!r} in {short(text)}", "leave it out")
    return text


def short(value: Any) -> str:
    """A value as messages show it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
