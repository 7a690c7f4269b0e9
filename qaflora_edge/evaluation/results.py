"""The file of an evaluation: its first line says what is asked, the others what came of each item.

    {"eval": 1, "version": "...", "bundle": "...", "base": {...}, "adapters": [...], ...}
    {"task": "math_es", "item": 0, "strategy": "static", "score": 1.0, "answer": "...", ...}

Lines are added as items end, so that a run that was killed is gone on with. A file may come from
anywhere: every line is checked, and the fields are those of `data/results_*.schema.json`.
"""

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from qaflora_edge.errors import ResultsFileError, os_errors
from qaflora_edge.files import open_input
from qaflora_edge.formats.json_text import (
    WrongField,
    check_schema,
    read_unicode_object,
    shortened,
    shown,
)
from qaflora_edge.line_file import LineFile

MAX_LINE_BYTES = 4 << 20
MAX_FILE_BYTES = 1 << 30
MAX_LOSS = 10_000  # nats a token; float32 logits of a model are far below
# What has to be the same in a file that is gone on with; `strategies` may be added to.
IDENTITY = ("bundle", "base", "adapters", "n_layer", "tasks", "options")

_ADVICE = "Give a file that `qaflora eval -o` has written."
_BEGIN = b'{"eval": '  # of every file


@dataclass(frozen=True)
class Results:
    """A results file, read.

    header   its first line
    records  the others, one for each item and strategy, in the order that they came
    """

    header: Mapping[str, Any]
    records: tuple[Mapping[str, Any], ...]

    @property
    def strategies(self) -> tuple[str, ...]:
        """Every strategy: those of the first run, then those that were added."""
        found = dict.fromkeys(self.header["strategies"])
        return tuple(found | dict.fromkeys(record["strategy"] for record in self.records))

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters in use, in the order of the first axis of `layers`."""
        return tuple(adapter["name"] for adapter in self.header["adapters"])


def read_results(path: str | Path) -> Results:
    """Read a results file, or one packed by gzip as FILE.gz; a last line that was cut is left out.

    Raises ResultsFileError naming the line and field, what was found and what was expected.
    """
    try:
        with os_errors(ResultsFileError, f"Cannot read {path}", _ADVICE), open_input(path) as file:
            if str(path).endswith(".gz"):
                with gzip.open(file) as unpacked:
                    return _read(unpacked, str(path))[0]
            return _read(file, str(path))[0]
    except (EOFError, zlib.error) as error:
        raise ResultsFileError(
            f"Cannot read {path}: it is no whole gzip file ({error}), expected one. Copy it again."
        ) from error


class ResultsFile:
    """A results file that grows: read as far as it goes, then added to, one whole line at a time.

    path    None: nothing is written, and results are kept in memory only
    header  of this run
    """

    def __init__(self, path: Path | None, header: Mapping[str, Any]) -> None:
        self._lines = None if path is None else LineFile(path, "results")
        self._header = dict(header)
        self._records: dict[tuple[str, int, str], Mapping[str, Any]] = {}

    @property
    def results(self) -> Results:
        """All that there is by now."""
        return Results(self._header, tuple(self._records.values()))

    def has(self, task: str, item: int, strategy: str) -> bool:
        """Tell whether an item was scored under a strategy."""
        return (task, item, strategy) in self._records

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Read what the file has, and keep others from writing into it.

        Raises ResultsFileError or OutputFileError when it is of another evaluation, or cannot be
        written to; then it stays as it is.
        """
        if self._lines is None:
            yield
            return
        with self._lines.opened():
            self._go_on(self._lines)
            yield

    def write(self, record: Mapping[str, Any]) -> None:
        """Add the result of an item under a strategy."""
        if self._lines is not None:
            for line in (record,) if self._lines.n_byte else (self._header, record):
                self._lines.add(json.dumps(line, ensure_ascii=False, allow_nan=False))
        self._records[record["task"], record["item"], record["strategy"]] = record

    def _go_on(self, lines: LineFile) -> None:
        try:
            with open_input(lines.path) as file:
                found, lines.n_byte = _read(file, str(lines.path), is_begun=True)
        except FileNotFoundError:
            return
        except OSError as error:
            raise lines.refused(error.strerror or str(error), "See to it") from error
        if lines.n_byte == 0:  # empty, or killed while its first line was written
            return
        theirs, ours = _comparable(found.header, self._header)
        for key in (*IDENTITY, "measured"):
            if theirs[key] != ours[key]:
                what = _difference(key, theirs, ours)
                raise lines.refused(
                    f"it is of another evaluation: its {what}", "Give what it was begun with"
                )
        for record in found.records:
            self._records[record["task"], record["item"], record["strategy"]] = record
        self._header = dict(found.header)


def _comparable(*headers: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Two headers with what both measured: a bundle may get more, and older files do not say it."""
    shared = set.intersection(*({*header.get("measured", {})} for header in headers))
    return [
        {**header, "measured": {key: header["measured"][key] for key in sorted(shared)}}
        for header in headers
    ]


def _read(
    file: BinaryIO | gzip.GzipFile, where: str, *, is_begun: bool = False
) -> tuple[Results, int]:
    """A results file, and the bytes of its whole lines.

    is_begun  it may be empty, or cut in its first line: then the header is empty
    """
    header: dict[str, Any] = {}
    records: dict[tuple[str, int, str], Mapping[str, Any]] = {}
    n_byte = 0
    for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), 1):
        if not line.endswith(b"\n") and len(line) <= MAX_LINE_BYTES:
            if number == 1 and not (is_begun and _BEGIN.startswith(line[: len(_BEGIN)])):
                raise _wrong(where, number, "it is cut", "a line that ends")
            break  # of a run that was killed
        n_byte += len(line)
        if len(line) > MAX_LINE_BYTES or n_byte > MAX_FILE_BYTES:
            what = "the file" if n_byte > MAX_FILE_BYTES else "it"
            most = MAX_FILE_BYTES if n_byte > MAX_FILE_BYTES else MAX_LINE_BYTES
            raise _wrong(where, number, f"{what} is too long", f"at most {most >> 20} MiB")
        found = _parsed(line, where, number)
        if number == 1:
            header = found
            continue
        key = (found["task"], found["item"], found["strategy"])
        _check_record(found, header, where, number, is_new=key not in records)
        records[key] = found
    if not header and not is_begun:
        raise _wrong(where, 1, "the file is empty", "a header and results")
    return Results(header, tuple(records.values())), n_byte


def _parsed(line: bytes, where: str, number: int) -> dict[str, Any]:
    try:
        found = read_unicode_object(line)
        check_schema(found, "results_header" if number == 1 else "results_item")
    except WrongField as error:
        raise ResultsFileError(f"Cannot use {where}, line {number}: {error}. {_ADVICE}") from error
    except ValueError as error:  # errors of JSON and UTF-8 too
        raise _wrong(where, number, f"it is no JSON object ({error})", "one") from error
    return found


def _check_record(
    record: Mapping[str, Any], header: Mapping[str, Any], where: str, number: int, *, is_new: bool
) -> None:
    """What a schema cannot say: that a result is one of these tasks and adapters."""
    tasks = {task["name"]: task["n_item"] for task in header["tasks"]}
    task, adapters = record["task"], [adapter["name"] for adapter in header["adapters"]]
    if task not in tasks:
        raise _wrong(where, number, f"task is {shown(task)}", f"one of {', '.join(tasks)}")
    if record["item"] >= tasks[task]:
        most = f"at most {tasks[task] - 1}, the last of {task}"
        raise _wrong(where, number, f"item is {record['item']}", most)
    if not is_new:
        raise _wrong(where, number, "item and strategy are those of an earlier line", "others")
    is_weighed = record.get("error") is None or record["weights"]
    if is_weighed and list(record["weights"]) != adapters:
        names = ", ".join(adapters) or "no adapters"
        raise _wrong(where, number, f"weights are of {shown(list(record['weights']))}", names)
    if (record["score"] is None) == (record.get("error") is None):
        found = f"score is {shown(record['score'])} and error {shown(record.get('error'))}"
        raise _wrong(where, number, found, "one of them to be null")
    metric = next(each["metric"] for each in header["tasks"] if each["name"] == task)
    limit = MAX_LOSS if metric == "loss" else 1
    if record["score"] is not None and not 0 <= record["score"] <= limit:
        expected = f"0 to {limit} for the metric {metric}"
        raise _wrong(where, number, f"score is {record['score']}", expected)
    layers = record.get("layers")
    if layers is not None and [len(row) for row in layers] != [header["n_layer"]] * len(adapters):
        expected = f"{len(adapters)} lists of {header['n_layer']} numbers"
        raise _wrong(where, number, f"layers is {shown(layers)}", expected)


def _wrong(where: str, number: int, found: str, expected: str) -> ResultsFileError:
    return ResultsFileError(
        f"Cannot use {where}, line {number}: {found}, expected {expected}. {_ADVICE}"
    )


def _difference(key: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """What differs in a part of two headers, in words."""
    old, new = theirs[key], ours[key]
    if isinstance(old, dict) and isinstance(new, dict):
        for name in [*old, *(name for name in new if name not in old)]:
            if old.get(name) != new.get(name):
                return f"{key}.{name} is {shown(old.get(name))}, now it is {shown(new.get(name))}"
    if isinstance(old, list) and isinstance(new, list):
        names = [[each["name"] for each in part] for part in (old, new)]
        if names[0] != names[1]:
            listed = [shortened(", ".join(part) or "none") for part in names]
            return f"{key} are {listed[0]}, now they are {listed[1]}"
        for before, after in zip(old, new, strict=True):
            if before != after:
                name = before["name"]
                return f"{key}.{_difference(name, {name: before}, {name: after})}"
    return f"{key} is {shown(old)}, now it is {shown(new)}"
