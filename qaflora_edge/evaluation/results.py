"""The results file: its first line says what is asked, the others what came of each item.

    {"eval": 1, "version": "...", "bundle": "...", "base": {...}, "adapters": [...], ...}
    {"task": "math_es", "item": 0, "strategy": "static", "score": 1.0, "answer": "...", ...}

Lines are added as items end, so that a run that was killed can resume.
"""

import gzip
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
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


class Results:
    """Results by task, item and strategy, in the order that they came.

    header   what is asked, under which options: the first line of a file
    records  one for each item and strategy; `add` writes it into the file, if there is one
    """

    def __init__(self, header: Record, records: Iterable[Record] = ()) -> None:
        self.header = header
        self.records = {_key(record): record for record in records}
        self._file: LineFile | None = None

    @property
    def strategies(self) -> list[str]:
        """Every strategy: those of the first run, then those that were added."""
        return [*dict.fromkeys([*self.header["strategies"], *(key[2] for key in self.records)])]

    @property
    def failed(self) -> list[Record]:
        """Records of items that could not be asked."""
        return [record for record in self.records.values() if record["score"] is None]

    def add(self, record: Record) -> None:
        """Add the result of an item under a strategy."""
        if self._file is not None:
            for line in (record,) if self._file.n_byte else (self.header, record):
                self._file.add(json.dumps(line, ensure_ascii=False, allow_nan=False))
        self.records[_key(record)] = record


def read_results(path: str | Path) -> Results:
    """Read a results file, or one packed by gzip as FILE.gz; a last line that was cut is left out.

    Raises ResultsFileError naming the line, what was found and what was expected.
    """
    lines, _ = _read(path)
    if not lines:
        raise _wrong(path, 1, "it is empty or cut", "a header and results")
    return Results(lines[0], lines[1:])


@contextmanager
def kept_results(path: Path | None, header: Record) -> Iterator[Results]:
    """Give results that grow by whole lines; what the file has already is read first.

    path    None: nothing is written
    header  of this run

    Raises ResultsFileError or OutputFileError when the file is of another evaluation, or cannot be
    written to; then it stays as it is.
    """
    results = Results(header)
    with ExitStack() as stack:
        if path is not None:
            file = LineFile(path, "results")
            stack.enter_context(file.opened())
            lines, file.n_byte = _read(path) if path.exists() else ([], 0)
            if lines:  # else it is new, or was killed while its first line was written
                for key in IDENTITY:
                    if lines[0].get(key) != header[key]:
                        found = f"it was begun with another value of `{key}`, expected the same"
                        raise file.refused(found, "Give what it was begun with")
                results = Results(lines[0], lines[1:])
            results._file = file
        yield results


def _key(record: Record) -> tuple[str, int, str]:
    return record["task"], record["item"], record["strategy"]


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
    return found, len(whole) if found else 0


def _wrong(path: str | Path, number: int, found: str, expected: str) -> ResultsFileError:
    return ResultsFileError(
        f"Cannot use {path}, line {number}: {found}, expected {expected}. {ADVICE}"
    )
