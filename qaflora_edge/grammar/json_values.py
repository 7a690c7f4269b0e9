"""JSON values and schemas: types, equality, whether two schemas share a value, or one has any."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


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
