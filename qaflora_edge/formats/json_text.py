"""Read JSON from anywhere: strict, bounded in memory and depth; check it; write it by lines."""

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from qaflora_edge.errors import OutputFileError, os_errors
from qaflora_edge.files import cache_lock, package_data

MAX_JSON_VALUES = 1 << 20  # a little text such as "[[],[]]" becomes much memory
MAX_JSON_DEPTH = 64
MAX_SHOWN_CHARS = 80
_KINDS = {"object": "an object", "array": "a list"}


def read_json_object(data: bytes) -> dict[str, Any]:
    """Parse a JSON object strictly: Unicode text, no key twice, finite numbers only.

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
            parse_constant=_finite,
            parse_float=_finite,
        )
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}, not an object")
    _check_depth(value, MAX_JSON_DEPTH)
    if b"\\u" in data:
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            reason = "it has half of a surrogate pair, which is no Unicode text"
            raise ValueError(reason) from None
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for key, value in pairs:
        if key in fields:
            raise ValueError(f"the key {key[:80]!r} is given twice")
        fields[key] = value
    return fields


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:80]} is not finite")
    return value


def _check_depth(value: object, left: int) -> None:
    if isinstance(value, dict | list):
        if left == 0:
            raise ValueError("it is nested too deeply")
        for child in value.values() if isinstance(value, dict) else value:
            _check_depth(child, left - 1)


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
        definition, place, found = error.definition, error.name, shown(error.value)
        if error.rule == "required":
            key = next(key for key in error.rule_definition if key not in error.value)
            place, found = f"{place}.{key}", "missing"
            definition = definition["properties"][key]
            if "$ref" in definition:
                definition = schema["$defs"][definition["$ref"].rpartition("/")[2]]
        expected = definition.get("title") or _KINDS[definition["type"]]
        raise WrongField(shortened(place.removeprefix("data.")), found, expected) from None


@cache
def _load(name: str) -> tuple[dict[str, Any], Callable[[object], object]]:
    import fastjsonschema

    schema = json.loads(package_data(f"data/{name}.schema.json").read_text(encoding="utf-8"))
    return schema, fastjsonschema.compile(schema, use_default=False)


def shown(value: object) -> str:
    """Show a value as JSON, short enough for a message."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except ValueError:  # a number of more digits than Python prints
        return f"a {type(value).__name__}"
    return shortened(text.encode("utf-8", "backslashreplace").decode("utf-8"))


def shortened(text: str) -> str:
    return text if len(text) <= MAX_SHOWN_CHARS else text[: MAX_SHOWN_CHARS - 3] + "..."


class LineFile:
    """A file to which one process adds whole lines; a cut last line is removed first.

    holds   what the lines are, for errors
    n_byte  of its whole lines, set by the reader of the file
    """

    def __init__(self, path: Path, holds: str) -> None:
        self.path, self.n_byte, self._holds = path, 0, holds

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Keep others from writing into it. Raises OutputFileError when another process does."""
        from filelock import Timeout

        try:
            with cache_lock(str(self.path.resolve())).acquire(timeout=0):
                yield
        except Timeout:
            found = f"another process writes {self._holds} into it, and no other was expected"
            raise self.refused(found, "Wait for it to end") from None

    def add(self, record: Mapping[str, Any]) -> None:
        """Add an object as a line. Raises OutputFileError when it cannot be written."""
        line = json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        failure = f"Cannot write {self._holds} into {self.path}"
        advice = "See to it and run the same again, which resumes, or choose another -o FILE."
        mode: Any = "r+b" if self.n_byte else "wb"
        with os_errors(OutputFileError, failure, advice), open(self.path, mode) as file:
            file.truncate(self.n_byte)
            file.seek(self.n_byte)
            file.write(line)
        self.n_byte += len(line)

    def refused(self, found: str, advice: str) -> OutputFileError:
        """Make an error that names the file, what was found in the way, and what to do."""
        return OutputFileError(
            f"Cannot write {self._holds} into {self.path}: {found}. {advice}, or choose another "
            "-o FILE."
        )
