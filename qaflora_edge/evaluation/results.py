"""The results file: its first line says what is asked, the others what came of each item.

    {"eval": 1, "version": "...", "bundle": "...", "base": {...}, "adapters": [...], ...}
    {"task": "math_es", "item": 0, "strategy": "static", "score": 1.0, "answer": "...", ...}

Lines are added as items end, so that a run that was killed can resume.
"""

import gzip
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qaflora_edge.errors import ResultsFileError, os_errors
from qaflora_edge.formats.inputs import open_input
from qaflora_edge.formats.json_text import LineFile, read_json_object

# Has to be equal in a file that is resumed; strategies may be added.
IDENTITY = ("bundle", "base", "adapters", "n_layer", "measured", "tasks", "options")
BEGIN = b'{"eval": '  # of every file
ADVICE = "Give a file that `qaflora eval -o` has written."

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Results:
    """A results file, read.

    header   its first line
    records  the others, one for each item and strategy, in the order that they came
    """

    header: Record
    records: tuple[Record, ...]

    @property
    def strategies(self) -> tuple[str, ...]:
        """Every strategy: those of the first run, then those that were added."""
        found = dict.fromkeys(self.header["strategies"])
        return tuple(found | dict.fromkeys(record["strategy"] for record in self.records))

    @property
    def failed(self) -> list[Record]:
        """Records of items that could not be asked."""
        return [record for record in self.records if record["score"] is None]

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters in use."""
        return tuple(adapter["name"] for adapter in self.header["adapters"])


def read_results(path: str | Path) -> Results:
    """Read a results file, or one packed by gzip as FILE.gz; a last line that was cut is left out.

    Raises ResultsFileError naming the line, what was found and what was expected.
    """
    with os_errors(ResultsFileError, f"Cannot read {path}", ADVICE), open_input(path) as file:
        data = gzip.decompress(file.read()) if str(path).endswith(".gz") else file.read()
    found, _ = _parsed(path, data)
    if not found.header:
        raise _wrong(path, 1, "it is empty or cut", "a header and results")
    return found


class ResultsFile:
    """A results file that grows by whole lines; what it has already is read first.

    path     None: nothing is written, and results are kept in memory only
    header   of this run
    records  what there is by now, by task, item and strategy
    """

    def __init__(self, path: Path | None, header: Record) -> None:
        self._lines = None if path is None else LineFile(path, "results")
        self._header = header
        self.records: dict[tuple[str, int, str], Record] = {}

    @property
    def results(self) -> Results:
        """Everything that there is by now."""
        return Results(self._header, tuple(self.records.values()))

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
            self._resume(self._lines)
            yield

    def write(self, record: Record) -> None:
        """Add the result of an item under a strategy."""
        if self._lines is not None:
            for line in (record,) if self._lines.n_byte else (self._header, record):
                self._lines.add(json.dumps(line, ensure_ascii=False, allow_nan=False))
        self.records[_key(record)] = record

    def _resume(self, file: LineFile) -> None:
        try:
            with open_input(file.path) as begun:
                found, n_byte = _parsed(file.path, begun.read())
        except FileNotFoundError:
            return
        except OSError as error:
            raise file.refused(error.strerror or str(error), "See to it") from error
        if not found.header:  # empty, or killed while its first line was written
            return
        if any(self._header[key] != found.header.get(key) for key in IDENTITY):
            what = "it was begun for another bundle, task or option, expected the same"
            raise file.refused(what, "Give what it was begun with")
        self._header, file.n_byte = found.header, n_byte
        self.records = {_key(record): record for record in found.records}


def _key(record: Record) -> tuple[str, int, str]:
    return record["task"], record["item"], record["strategy"]


def _parsed(path: str | Path, data: bytes) -> tuple[Results, int]:
    """Read whole lines, and count their bytes; the header is empty where there is none."""
    if not data.startswith(BEGIN[: len(data)]):
        raise _wrong(path, 1, "it is no results file", "one")
    lines = data.split(b"\n")[:-1]
    found: list[Record] = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(read_json_object(line))
        except ValueError as error:  # errors of JSON and UTF-8 too
            raise _wrong(path, number, f"it is no JSON object ({error})", "one") from error
    header, *records = found or [{}]
    return Results(header, tuple(records)), sum(len(line) + 1 for line in lines)


def _wrong(path: str | Path, number: int, found: str, expected: str) -> ResultsFileError:
    return ResultsFileError(
        f"Cannot use {path}, line {number}: {found}, expected {expected}. {ADVICE}"
    )
