"""A file of lines that one process adds to, and that is gone on with."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from qaflora_edge.errors import OutputFileError
from qaflora_edge.files import cache_lock


class LineFile:
    """A file to which one process adds whole lines; a cut last line is removed first.

    holds   what the lines are, for errors
    n_byte  of its whole lines, set by the reader of the file
    """

    def __init__(self, path: Path, holds: str) -> None:
        self.path, self.n_byte, self._holds = path, 0, holds
        self._file: BinaryIO | None = None

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Keep others from writing into it. Raises OutputFileError when another process does."""
        from filelock import Timeout

        lock = cache_lock(str(self.path.resolve()))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise self.refused(
                f"another process writes {self._holds} into it, and no other was expected",
                "Wait for it to end",
            ) from None
        try:
            yield
        finally:
            lock.release()
            if self._file is not None:
                with suppress(OSError):  # it still holds a line only where `add` has failed
                    self._file.close()

    def add(self, text: str) -> None:
        """Add a line. Raises OutputFileError when it cannot be written."""
        line = text.encode() + b"\n"
        try:
            if self._file is None:
                self._file = open(self.path, "ab")  # noqa: SIM115
                self._file.truncate(self.n_byte)
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            raise self.refused(
                error.strerror or str(error), "See to it and run the same again, which goes on"
            ) from error
        self.n_byte += len(line)

    def refused(self, found: str, advice: str) -> OutputFileError:
        """An error that names the file, what was found in the way, and what to do."""
        return OutputFileError(
            f"Cannot write {self._holds} into {self.path}: {found}. {advice}, or choose another "
            "-o FILE."
        )
