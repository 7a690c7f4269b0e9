"""JSON from anywhere: what is no plain object, or would take memory or recursion, is refused."""

import json
import re
import tracemalloc

import pytest

from qaflora_edge.formats.json_text import (
    MAX_JSON_DEPTH,
    MAX_JSON_VALUES,
    is_unicode,
    read_json_object,
)


def test_object_is_read_as_the_standard_library_does() -> None:
    text = '{"a": [1, 2.5, -3e2, true, null, "é\\u0000"], "b": {"c": {}}}'
    assert read_json_object(text.encode()) == json.loads(text)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"[]", "it holds a list, not an object"),
        (b"{", "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        (b'{"a": NaN}', "the value NaN is not JSON"),
        (b'{"a": 1e999}', "the number 1e999 is too large"),
        (b'{"a": -' + b"7" * 5000 + b"}", f"the number -{'7' * 79} has 5000 digits"),
        (b'{"a": {"b": 1, "b": 2}}', "the key 'b' is given twice"),
        (b'{"a":' + b"[" * 200_000, "it is nested too deeply"),
    ],
)
def test_other_text_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(reason)}$"):
        read_json_object(data)


def test_depth_is_bounded_exactly() -> None:
    def nested(depth: int) -> bytes:
        return b'{"a":' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"

    read_json_object(nested(MAX_JSON_DEPTH))
    with pytest.raises(ValueError, match="it is nested too deeply"):
        read_json_object(nested(MAX_JSON_DEPTH + 1))


def test_many_values_are_refused_before_they_take_memory() -> None:
    data = b'{"a":[' + b"[]," * MAX_JSON_VALUES + b"[]]}"
    tracemalloc.start()
    reason = f"it has about {2 * MAX_JSON_VALUES + 3} values, and {MAX_JSON_VALUES} are the most"
    try:
        with pytest.raises(ValueError, match=f"^{reason}$"):
            read_json_object(data)
        assert tracemalloc.get_traced_memory()[1] < 2 * len(data)  # nothing was parsed
    finally:
        tracemalloc.stop()


def test_half_a_character_is_no_unicode() -> None:
    assert is_unicode("\U0001f600 é")
    assert not is_unicode(read_json_object(b'{"a": "\\ud83d"}')["a"])
