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
    lines, _ = _read(path)
    if not lines:
        raise _wrong(path, 1, "it is empty or cut", "a header and results")
    return Results(lines[0], tuple(lines[1:]))


class ResultsFile:
    """A results file that grows by whole lines; what it has already is read first.

    path     None: nothing is written, and results are kept in memory only
    header   of this run
    records  what there is by now, by task, item and strategy
    """

    def __init__(self, path: Path | None, header: Record) -> None:
        self._file = None if path is None else LineFile(path, "results")
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
        if self._file is None:
            yield
            return
        with self._file.opened():
            if self._file.path.exists():
                self._resume(self._file)
            yield

    def write(self, record: Record) -> None:
        """Add the result of an item under a strategy."""
        if self._file is not None:
            for line in (record,) if self._file.n_byte else (self._header, record):
                self._file.add(json.dumps(line, ensure_ascii=False, allow_nan=False))
        self.records[record["task"], record["item"], record["strategy"]] = record

    def _resume(self, file: LineFile) -> None:
        lines, n_byte = _read(file.path)
        if not lines:  # empty, or killed while its first line was written
            return
        if any(self._header[key] != lines[0].get(key) for key in IDENTITY):
            what = "it was begun for another bundle, task or option, expected the same"
            raise file.refused(what, "Give what it was begun with")
        self._header, file.n_byte = lines[0], n_byte
        self.records = {(each["task"], each["item"], each["strategy"]): each for each in lines[1:]}


def _read(path: str | Path) -> tuple[list[Record], int]:
    """Read whole lines, and count their bytes."""
    with os_errors(ResultsFileError, f"Cannot read {path}", ADVICE), open_input(path) as file:
        data = gzip.decompress(file.read()) if str(path).endswith(".gz") else file.read()
    if not data.startswith(BEGIN[: len(data)]):
        raise _wrong(path, 1, "it is no results file", "one")
    whole = data[: data.rfind(b"\n") + 1]
    found: list[Record] = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            found.append(read_json_object(line))
        except ValueError as error:  # errors of JSON and UTF-8 too
            raise _wrong(path, number, f"it is no JSON object ({error})", "one") from error
    return found, len(whole)


def _wrong(path: str | Path, number: int, found: str, expected: str) -> ResultsFileError:
    return ResultsFileError(
        f"Cannot use {path}, line {number}: {found}, expected {expected}. {ADVICE}"
    )
