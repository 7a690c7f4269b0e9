"""Check JSON by a schema that ships with the package; the schema is the only list of its fields.

What a field should be is said by the title that the schema gives it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any

from qaflora_edge.files import package_data

MAX_SHOWN_CHARS = 80
_KINDS = {"object": "an object", "array": "a list"}


class WrongField(ValueError):
    """A field that is not what it should be; the reader adds which file it is in."""

    def __init__(self, name: str, found: str, expected: str) -> None:
        super().__init__(f"field {name} is {found}, expected {expected}")


def check_schema(document: object, name: str) -> None:
    """Check a document by `data/NAME.schema.json`. Raises WrongField for the first difference."""
    from fastjsonschema import JsonSchemaValueException

    schema, check = _load(name)
    try:
        check(document)
    except JsonSchemaValueException as error:
        definition, value, place = error.definition, error.value, error.name
        if error.rule == "required":
            key = next(key for key in error.rule_definition if key not in value)
            place, definition = f"{place}.{key}", definition["properties"][key]
            if "$ref" in definition:
                definition = schema["$defs"][definition["$ref"].rpartition("/")[2]]
            found = "missing"
        elif error.rule == "maxLength":
            found = f"{len(value)} characters long"
        elif error.rule == "maxItems":
            found = f"a list of {len(value)}"
        else:
            found = shown(value)
        expected = definition.get("title") or _KINDS[definition["type"]]
        place = shortened(place.removeprefix("data."))
        raise WrongField(place, found, expected) from None


@cache
def _load(name: str) -> tuple[dict[str, Any], Callable[[object], object]]:
    import fastjsonschema

    schema = json.loads(package_data(f"data/{name}.schema.json").read_text(encoding="utf-8"))
    return schema, fastjsonschema.compile(schema, use_default=False)


def shown(value: object) -> str:
    """A value as JSON, short enough for a message."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except ValueError:  # a number of more digits than Python prints
        return f"a {type(value).__name__}"
    return shortened(text.encode("utf-8", "backslashreplace").decode("utf-8"))


def shortened(text: str) -> str:
    return text if len(text) <= MAX_SHOWN_CHARS else text[: MAX_SHOWN_CHARS - 3] + "..."
