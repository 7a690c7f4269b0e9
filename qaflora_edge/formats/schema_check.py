"""Documents checked by the schemas that the package ships: of JSON Schema, the words they use.

A library that compiles schemas took 50 ms for bundle.json's, in every process that opens a bundle.
"""

import json
import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NoReturn

from qaflora_edge.files import package_data
from qaflora_edge.formats.json_text import shortened, shown

Schema = Mapping[str, Any]

_KINDS = {"object": "an object", "array": "a list"}
_TYPES: dict[str, Callable[[Any], bool]] = {
    "null": lambda value: value is None,
    "boolean": lambda value: isinstance(value, bool),
    "integer": lambda value: _is_number(value) and value % 1 == 0,
    "number": lambda value: _is_number(value),
    "string": lambda value: isinstance(value, str),
    "array": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, dict),
}


class WrongField(ValueError):
    """A field that is not what it should be; the reader adds which file it is in."""

    def __init__(self, name: str, found: str, expected: str) -> None:
        super().__init__(f"field {name} is {found}, expected {expected}")


def check_schema(document: object, name: str) -> None:
    """Check a document by `data/NAME.schema.json`, the only list of its fields.

    Raises WrongField for the first difference. What a field should be is said by its title there.
    """
    schema = _read(name)
    _check(document, schema, "data", schema)


@cache
def _read(name: str) -> Schema:
    text = package_data(f"data/{name}.schema.json").read_text(encoding="utf-8")
    schema: Schema = json.loads(text)
    return schema


def _check(value: Any, schema: Schema, place: str, root: Schema) -> None:
    """Raise WrongField for the first difference below a place."""
    schema = _resolved(schema, root)
    if "type" in schema:
        types = schema["type"]
        if not any(_TYPES[each](value) for each in ([types] if isinstance(types, str) else types)):
            _fail(value, schema, place)
    if "enum" in schema and value not in schema["enum"]:  # texts only
        _fail(value, schema, place)
    if "const" in schema and (value != schema["const"] or isinstance(value, bool)):
        _fail(value, schema, place)
    for each in schema.get("allOf", ()):
        _check(value, each, place, root)
    if "anyOf" in schema and not any(_fits(value, each, root) for each in schema["anyOf"]):
        _fail(value, schema, place)
    if isinstance(value, str):
        _check_text(value, schema, place)
    elif isinstance(value, list):
        _check_list(value, schema, place, root)
    elif isinstance(value, dict):
        _check_object(value, schema, place, root)
    elif _is_number(value):
        _check_number(value, schema, place)


def _check_text(value: str, schema: Schema, place: str) -> None:
    if len(value) > schema.get("maxLength", len(value)):
        _fail(value, schema, place, f"{len(value)} characters long")
    if len(value) < schema.get("minLength", 0) or not re.search(schema.get("pattern", ""), value):
        _fail(value, schema, place)


def _check_number(value: float, schema: Schema, place: str) -> None:
    if not (
        schema.get("minimum", value) <= value <= schema.get("maximum", value)
        and ("exclusiveMinimum" not in schema or value > schema["exclusiveMinimum"])
    ):
        _fail(value, schema, place)


def _check_list(value: list[Any], schema: Schema, place: str, root: Schema) -> None:
    if len(value) > schema.get("maxItems", len(value)):
        _fail(value, schema, place, f"a list of {len(value)}")
    if len(value) < schema.get("minItems", 0):
        _fail(value, schema, place)
    if "items" in schema:
        for index, item in enumerate(value):
            _check(item, schema["items"], f"{place}[{index}]", root)


def _check_object(value: dict[str, Any], schema: Schema, place: str, root: Schema) -> None:
    properties = schema.get("properties", {})
    for key in schema.get("required", ()):
        if key not in value:
            _fail(None, _resolved(properties[key], root), f"{place}.{key}", "missing")
    others = schema.get("additionalProperties", True)
    if others is False and value.keys() - properties:
        _fail(value, schema, place)
    for key, part in properties.items():
        if key in value:
            _check(value[key], part, f"{place}.{key}", root)
    for key, item in value.items():
        if isinstance(others, dict) and key not in properties:
            _check(item, others, f"{place}.{key}", root)
        if "propertyNames" in schema and not _fits(key, schema["propertyNames"], root):
            _fail(value, schema, place)


def _fits(value: Any, schema: Schema, root: Schema) -> bool:
    try:
        _check(value, schema, "", root)
    except WrongField:
        return False
    return True


def _resolved(schema: Schema, root: Schema) -> Schema:
    """What `$ref` names; nothing else of meaning stands beside one."""
    while "$ref" in schema:
        schema = root["$defs"][schema["$ref"].rpartition("/")[2]]
    return schema


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _fail(value: Any, schema: Schema, place: str, found: str | None = None) -> NoReturn:
    expected = schema.get("title") or _KINDS.get(str(schema.get("type")), "another value")
    name = shortened(place.removeprefix("data."))
    raise WrongField(name, shown(value) if found is None else found, expected)
