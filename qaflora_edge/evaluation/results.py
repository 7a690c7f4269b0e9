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
from qaflora_edge.files import open_input
from qaflora_edge.formats.json_text import read_unicode_object, shown
from qaflora_edge.line_file import LineFile

# What has to be the same in a file that is resumed; `strategies` may be added to.
IDENTITY = ("bundle", "base", "adapters", "n_layer", "tasks", "options")
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
        """Names of the adapters in use, in the order of the first axis of `layers`."""
        return tuple(adapter["name"] for adapter in self.header["adapters"])


def read_results(path: str | Path) -> Results:
    """Read a results file, or one packed by gzip as FILE.gz.

    Raises ResultsFileError naming the line, what was found and what was expected.
    """
    with os_errors(ResultsFileError, f"Cannot read {path}", ADVICE), open_input(path) as file:
        data = gzip.decompress(file.read()) if str(path).endswith(".gz") else file.read()
    lines = _whole_lines(data)
    if not lines or not data.startswith(BEGIN):
        raise _wrong(path, 1, "it is empty, cut or of another kind", "a header and results")
    return _results(path, lines)


class ResultsFile:
    """A results file that grows by whole lines; what it has already is read first.

    path    None: nothing is written, and results are kept in memory only
    header  of this run
    """

    def __init__(self, path: Path | None, header: Record) -> None:
        self._lines = None if path is None else LineFile(path, "results")
        self._header = dict(header)
        self._records: dict[tuple[str, int, str], Record] = {}

    @property
    def results(self) -> Results:
        """Everything that there is by now."""
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
            self._resume(self._lines)
            yield

    def write(self, record: Record) -> None:
        """Add the result of an item under a strategy."""
        if self._lines is not None:
            for line in (record,) if self._lines.n_byte else (self._header, record):
                self._lines.add(json.dumps(line, ensure_ascii=False, allow_nan=False))
        self._keep(record)

    def _keep(self, record: Record) -> None:
        self._records[record["task"], record["item"], record["strategy"]] = record

    def _resume(self, file: LineFile) -> None:
        try:
            with open_input(file.path) as begun:
                data = begun.read()
        except FileNotFoundError:
            return
        except OSError as error:
            raise file.refused(error.strerror or str(error), "See to it") from error
        lines = _whole_lines(data)
        if not data.startswith(BEGIN[: len(data)]):
            raise _wrong(file.path, 1, "it is no results file", "one, or no file")
        if not lines:  # killed while the first line was written
            return
        found = _results(file.path, lines)
        theirs, ours = _comparable(found.header, self._header)
        if theirs != ours:
            what = _difference("", theirs, ours)
            advice = "Give what it was begun with"
            raise file.refused(f"it is of another evaluation: its {what}", advice)
        self._header = dict(found.header)
        for record in found.records:
            self._keep(record)
        file.n_byte = sum(map(len, lines))


def _comparable(*headers: Record) -> list[Record]:
    """Take from two headers what has to be the same, and what both have measured.

    A bundle may get more samples, and older files do not say what was measured.
    """
    shared = set.intersection(*({*header.get("measured", {})} for header in headers))
    return [
        {key: header[key] for key in IDENTITY}
        | {"measured": {key: header["measured"][key] for key in sorted(shared)}}
        for header in headers
    ]


def _difference(key: str, old: Any, new: Any) -> str:
    """Say where two headers differ, or two values of them."""
    if isinstance(old, list) and isinstance(new, list):
        parts = [{each["name"]: each for each in part} for part in (old, new)]
        names = [", ".join(part) or "none" for part in parts]
        if names[0] != names[1]:
            return f"{key} are {names[0]}, now they are {names[1]}"
        old, new = parts
    if isinstance(old, dict) and isinstance(new, dict):
        name = next(name for name in {**old, **new} if old.get(name) != new.get(name))
        return _difference(f"{key}.{name}".lstrip("."), old.get(name), new.get(name))
    return f"{key} is {shown(old)}, now it is {shown(new)}"


def _whole_lines(data: bytes) -> list[bytes]:
    """Split a file into its lines; a last one that was cut is left out."""
    return [line + b"\n" for line in data.split(b"\n")[:-1]]


def _results(path: str | Path, lines: list[bytes]) -> Results:
    header, *records = (_parsed(path, number, line) for number, line in enumerate(lines, 1))
    return Results(header, tuple(records))


def _parsed(path: str | Path, number: int, line: bytes) -> Record:
    try:
        found = read_unicode_object(line)
    except ValueError as error:  # errors of JSON and UTF-8 too
        raise _wrong(path, number, f"it is no JSON object ({error})", "one") from error
    return found


def _wrong(path: str | Path, number: int, found: str, expected: str) -> ResultsFileError:
    return ResultsFileError(
        f"Cannot use {path}, line {number}: {found}, expected {expected}. {ADVICE}"
    )
