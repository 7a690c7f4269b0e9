"""JSON from anywhere: what is no plain object, or would take memory or recursion, is refused."""

import json
import re
import tracemalloc

import pytest

from qaflora_edge.errors import OutputFileError
from qaflora_edge.evaluation.tasks import LineFile
from qaflora_edge.formats.inputs import MAX_JSON_DEPTH, MAX_JSON_VALUES, read_json_object


def test_object_is_read_as_the_standard_library_does() -> None:
    text = '{"a": [1, 2.5, -3e2, true, null, "é\\u0000"], "b": {"c": {}}}'
    assert read_json_object(text.encode()) == json.loads(text)
    read_json_object(b'{"a":' + b"[" * (MAX_JSON_DEPTH - 1) + b"]" * (MAX_JSON_DEPTH - 1) + b"}")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"[]", "it holds a list, not an object"),
        (b"{", "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        (b'{"a": NaN}', "the number NaN is not finite"),
        (b'{"a": 1e999}', "the number 1e999 is not finite"),
        (b'{"a": -' + b"7" * 5000 + b"}", "Exceeds the limit (4300 digits) for integer"),
        (b'{"a": {"b": 1, "b": 2}}', "the key 'b' is given twice"),
        (b'{"a":' + b"[" * 200_000, "it is nested too deeply"),
        (b'{"a":' + b"[" * 64 + b"]" * 64 + b"}", "it is nested too deeply"),
        (b'{"a": "\\ud83d"}', "it has half of a surrogate pair, which is no Unicode text"),
    ],
)
def test_other_text_is_refused(data, reason) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(reason)}"):
        read_json_object(data)


def test_many_values_are_refused_before_they_take_memory() -> None:
    data = b'{"a":[' + b"[]," * MAX_JSON_VALUES + b"[]]}"
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=f"values, and {MAX_JSON_VALUES} are the most"):
            read_json_object(data)
        assert tracemalloc.get_traced_memory()[1] < 2 * len(data)  # nothing was parsed
    finally:
        tracemalloc.stop()


def test_file_of_lines_that_vanishes_is_named(tmp_path) -> None:
    lines = LineFile(tmp_path / "a.jsonl", "answers", b"{")
    (tmp_path / "a.jsonl").write_text("{}\ncut")
    lines.n_byte = 3
    lines.add({"a": 1})
    assert (tmp_path / "a.jsonl").read_text() == '{}\n{"a": 1}\n'
    (tmp_path / "a.jsonl").unlink()
    told = r"answers into .*a\.jsonl: No such file or directory"
    with pytest.raises(OutputFileError, match=told):
        lines.add({})
    assert not (tmp_path / "a.jsonl").exists()
