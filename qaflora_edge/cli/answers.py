"""Where the answers to a file of requests go: to stdout, or to a file that can be gone on with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from qaflora_edge.cli.answer import print_json
from qaflora_edge.cli.prompts import read_lines
from qaflora_edge.cli.requests import Line
from qaflora_edge.errors import OutputFileError
from qaflora_edge.files import cache_lock, open_input

_BEGIN = b'{"index": '  # of every line that is written


class Answers:
    """One JSON object a line, written whole when an answer ends.

    Each says in `request` what it answers: options, and a line. So a file that was interrupted is
    gone on with, and no other file is taken for one.

    path  None: stdout
    key   equal where the options are
    """

    def __init__(self, path: Path | None, key: str) -> None:
        self._path, self._key = path, key
        self._file: BinaryIO | None = None
        self._digests: dict[int, str] = {}  # of the lines that the file answers, by their index
        self._n_byte = 0  # of whole lines in the file
        self.n_failed = 0
        self.first_failure = ""

    @property
    def indexes(self) -> set[int]:
        """The lines that the file answers."""
        return set(self._digests)

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Read what the file has, and keep others from writing into it.

        Raises OutputFileError when it cannot be written to, or has anything else in it.
        """
        if self._path is None:
            yield
            return
        from filelock import Timeout

        lock = cache_lock(str(self._path.resolve()))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise self._refused(
                "another process writes answers into it, and no other was expected",
                "Wait for it to end",
            ) from None
        try:
            self._read()
            yield
        finally:
            if self._file is not None:
                self._file.close()
            lock.release()

    def has(self, line: Line) -> bool:
        """Tell whether the file answers a line. Raises OutputFileError if it answers another."""
        digest = self._digests.get(line.index)
        if digest not in (None, line.digest):
            raise self._refused(f"it answers another text than {line.where}", "Give the same lines")
        return digest is not None

    def write(self, line: Line, answer: dict[str, Any]) -> None:
        """Add the answer to a line."""
        request = f"{self._key}-{line.digest}"
        record = {"index": line.index, **answer, "request": request}
        self._note(line.index, answer.get("error", {}).get("message", ""))
        if self._path is None:
            print_json(record)
            return
        try:
            if self._file is None:
                self._file = open(self._path, "ab")  # noqa: SIM115
                self._file.truncate(self._n_byte)  # a torn last line
            self._file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise self._refused(
                error.strerror or str(error), "See to it and run the same again, which goes on"
            ) from error

    def _read(self) -> None:
        assert self._path is not None
        try:
            file = open_input(self._path)
        except FileNotFoundError:
            return
        except OSError as error:
            raise self._refused(error.strerror or str(error), "Leave -o out for stdout") from error
        with file:
            for number, data in enumerate(read_lines(file, str(self._path)), 1):
                if data is not None and not data.endswith(b"\n"):
                    if not data.startswith(_BEGIN[: len(data)]):
                        raise self._not_ours(number)
                    return
                self._take(number, data)
                self._n_byte += len(data or b"")

    def _take(self, number: int, data: bytes | None) -> None:
        """Note a line of the file."""
        try:
            record = json.loads(data or b"")
            index, (key, digest) = int(record["index"]), record["request"].split("-")
            error = record.get("error", {}).get("message", "")
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
            raise self._not_ours(number) from None
        if key != self._key:
            raise self._refused(
                f"line {number} was answered by another bundle or under other options than these",
                "Give those that it was begun with",
            )
        self._digests[index] = digest
        self._note(index, error)

    def _note(self, index: int, error: str) -> None:
        self.n_failed += bool(error)
        if error and not self.first_failure:
            self.first_failure = f"line {index + 1}: {error}"

    def _not_ours(self, number: int) -> OutputFileError:
        return self._refused(
            f"line {number} is no answer of this command, and a file was expected that it began",
            "Leave the file",
        )

    def _refused(self, found: str, advice: str) -> OutputFileError:
        return OutputFileError(
            f"Cannot write answers into {self._path}: {found}. {advice}, or choose another -o FILE."
        )
