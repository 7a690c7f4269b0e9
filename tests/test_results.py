"""The results file: written line by line, gone on with, read whatever it holds."""

import json
from pathlib import Path
from typing import Any

import made_results
import pytest
from made_results import lines
from refusals import refused

from qaflora_edge.errors import OutputFileError
from qaflora_edge.evaluation.tasks import kept_results

HEADER = {**made_results.header({"sums": "number"}), "strategies": ["static"]}
WHOLE = json.dumps(HEADER).encode() + b"\n"


def record(item: int, strategy: str = "static", **fields: Any) -> dict[str, Any]:
    return made_results.record("sums", item, strategy, fields.pop("score", 1.0), **fields)


def write(path: Path, *records: dict[str, Any], head: dict[str, Any] = HEADER) -> None:
    with kept_results(path, head) as results:
        for each in records:
            results.add(each)


def test_what_is_written_is_read(tmp_path) -> None:
    path = tmp_path / "r.jsonl"
    records = [record(0, answer="¿12?"), record(1, "base"), record(2, score=0)]
    records.append(record(3, score=None, weights={}, error="The prompt is too long."))
    write(path, *records)
    assert lines(path) == [HEADER, *records]
    with kept_results(path, HEADER) as found:
        assert (found.header, [*found.records.values()]) == (HEADER, records)
        assert found.strategies == ["static", "base"]
        assert found.failed == records[3:]


@pytest.mark.parametrize("start", [b"", b'{"eval": 1, "vers'])
def test_a_file_without_a_whole_header_is_begun(tmp_path, start) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(start)
    write(path, record(0))
    assert lines(path) == [HEADER, record(0)]


@pytest.mark.parametrize("key", ["bundle", "options"])
def test_the_file_of_another_evaluation_stays(tmp_path, key) -> None:
    path = tmp_path / "r.jsonl"
    write(path, record(0))
    before = path.read_bytes()
    assert refused(OutputFileError, write, path, record(1), head={**HEADER, key: "another"}) == (
        f"Cannot write results into {path}: it was begun with another value of `{key}`, expected "
        "the same. Give what it was begun with, or choose another -o FILE."
    )
    assert path.read_bytes() == before


WRONG = [
    (b"my notes", "it has no results, and such were expected"),
    (b'{"eval": \n', "line 1 is no JSON object (Expecting value"),
    (WHOLE + b'{"score": 1e999}\n', "line 2 is no JSON object (the number 1e999 is not finite"),
]


@pytest.mark.parametrize(("data", "message"), WRONG)
def test_a_file_that_is_no_results_is_refused(tmp_path, data, message) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(data)
    told = refused(OutputFileError, write, path)
    assert told.startswith(f"Cannot write results into {path}: {message}")
    assert path.read_bytes() == data
