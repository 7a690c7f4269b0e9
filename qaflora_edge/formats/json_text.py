"""Read JSON that may come from anywhere: strict, and bounded in memory and depth; check it."""

import json
import math
from collections.abc import Callable
from functools import cache
from typing import Any

from qaflora_edge.files import package_data

MAX_JSON_VALUES = 1 << 20  # a little text such as "[[],[]]" becomes much memory
MAX_JSON_DEPTH = 64
MAX_DIGITS = 4000  # of a whole number; Python's own limit is somewhat higher


def read_json_object(data: bytes) -> dict[str, Any]:
    """Parse a JSON object strictly: UTF-8, no key twice, finite numbers only.

    Raises ValueError with the reason.
    """
    # Commas in texts are counted too: the bound is for memory, not for exactness.
    n_value = data.count(b",") + data.count(b"[") + data.count(b"{")
    if n_value > MAX_JSON_VALUES:
        raise ValueError(f"it has about {n_value} values, and {MAX_JSON_VALUES} are the most")
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_refuse,
            parse_float=_finite,
            parse_int=_whole,
        )
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}, not an object")
    _check_depth(value)
    return value


def read_unicode_object(data: bytes) -> dict[str, Any]:
    """The same without half of a surrogate pair in it, which only escapes can spell."""
    found = read_json_object(data)
    if b"\\u" in data and not is_unicode(json.dumps(found, ensure_ascii=False)):
        raise ValueError("it has half of a surrogate pair, which is no Unicode text")
    return found


def is_unicode(text: str) -> bool:
    """Tell whether UTF-8 can write a text; JSON's escapes may spell half a character."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key[:80]!r} is given twice")
        found[key] = value
    return found


def _refuse(constant: str) -> None:
    raise ValueError(f"the value {constant} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:80]} is too large")
    return value


def _whole(text: str) -> int:
    n_digit = len(text.lstrip("-"))
    if n_digit > MAX_DIGITS:
        raise ValueError(f"the number {text[:80]} has {n_digit} digits")
    return int(text)


def without_nan(value: Any) -> Any:
    """The same with None for numbers that JSON has not."""
    if isinstance(value, dict):
        return {key: without_nan(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _check_depth(value: object) -> None:
    """Go down level by level, for a deep value breaks whoever walks it by recursion."""
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        level = [
            child
            for item in level
            if isinstance(item, dict | list)
            for child in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return
    raise ValueError("it is nested too deeply")


MAX_SHOWN_CHARS = 80
_KINDS = {"object": "an object", "array": "a list"}


class WrongField(ValueError):
    """A field that is not what it should be; the reader adds which file it is in."""

    def __init__(self, name: str, found: str, expected: str) -> None:
        super().__init__(f"field {name} is {found}, expected {expected}")


def check_schema(document: object, name: str) -> None:
    """Check a document by `data/NAME.schema.json`, the only list of its fields.

    Raises WrongField for the first difference. What a field should be is said by its title there.
    """
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
