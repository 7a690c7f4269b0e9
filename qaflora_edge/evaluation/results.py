"""The results file: its first line says what is asked, the others what came of each item.

    {"eval": 1, "version": "...", "bundle": "...", "base": {...}, "adapters": [...], ...}
    {"task": "math_es", "item": 0, "strategy": "static", "score": 1.0, "answer": "...", ...}

Lines are added as items end, so that a run that was killed can resume.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qaflora_edge.errors import ResultsFileError, os_errors
from qaflora_edge.evaluation.tasks import json_lines
from qaflora_edge.formats.inputs import open_input
from qaflora_edge.formats.json_text import LineFile

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

    def __init__(
        self, header: Record, records: Iterable[Record] = (), file: LineFile | None = None
    ) -> None:
        self.header = header
        self.records = {_key(record): record for record in records}
        self._file = file

    @property
    def strategies(self) -> list[str]:
        """Every strategy: those of the first run, then those that were added."""
        names = list(self.header["strategies"])
        names += [record["strategy"] for record in self.records.values()]
        return list(dict.fromkeys(names))

    @property
    def failed(self) -> list[Record]:
        """Records of items that could not be asked."""
        return [record for record in self.records.values() if record["score"] is None]

    def add(self, record: Record) -> None:
        """Add the result of an item under a strategy."""
        if self._file is not None:
            self._file.add(record)
        self.records[_key(record)] = record


@contextmanager
def kept_results(path: Path | None, header: Record) -> Iterator[Results]:
    """Give results that grow by whole lines; what the file has already is read first.

    path  None: nothing is written

    Raises ResultsFileError or OutputFileError when the file is of another evaluation, or cannot be
    written to; then it stays as it is.
    """
    if path is None:
        yield Results(header)
        return
    file = LineFile(path, "results")
    with file.opened():
        lines: list[Record] = []
        if path.exists():
            lines, file.n_byte = _read(path)
        if not lines:  # it is new, or was killed while its first line was written
            lines = [header]
            file.add(header)
        begun = lines[0]
        for key in IDENTITY:
            if begun.get(key) != header[key]:
                fault = f"it was begun with another value of `{key}`, expected the same"
                raise file.refused(fault, "Give what it was begun with")
        yield Results(begun, lines[1:], file)


def _key(record: Record) -> tuple[str, int, str]:
    return record["task"], record["item"], record["strategy"]


def _read(path: Path) -> tuple[list[Record], int]:
    """Read whole lines, and count their bytes."""
    with os_errors(ResultsFileError, f"Cannot read {path}", ADVICE), open_input(path) as file:
        data = file.read()
    if not data.startswith(BEGIN[: len(data)]):
        raise _wrong(f"{path}, line 1", "it is no results file, expected one")
    n_byte = data.rfind(b"\n") + 1
    lines = json_lines(data[:n_byte], str(path), _wrong)
    return [record for _, record in lines], n_byte


def _wrong(where: str, what: str) -> ResultsFileError:
    return ResultsFileError(f"Cannot use {where}: {what}. {ADVICE}")
