"""The file of messages that were typed, which Up and Ctrl-R bring back."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from prompt_toolkit.history import FileHistory, History, InMemoryHistory

from qaflora_edge.errors import OutputFileError
from qaflora_edge.files import atomic_path, data_dir

BYTES_MAX = 1 << 20
_ENTRY = b"\n# "  # what begins an entry; the lines of a message begin with a plus


class _BoundedFile(FileHistory):
    def store_string(self, string: str) -> None:
        with contextlib.suppress(OSError):  # a full disk is no reason to lose a conversation
            super().store_string(string)


def open_history() -> tuple[History, str | None]:
    """The history, in a file that only its owner may read, or why it is not kept."""
    path = data_dir() / "chat-history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o600))
        if not path.is_file():
            raise OSError(0, "it is no ordinary file")
        if path.stat().st_size > BYTES_MAX:
            _forget_oldest(path)
    except OSError as error:
        return InMemoryHistory(), f"{path} cannot be used ({error.strerror})"
    return _BoundedFile(str(path)), None


def _forget_oldest(path: Path) -> None:
    """Keep the newest entries of a history, half of what it may have."""
    with path.open("rb") as file:
        file.seek(-BYTES_MAX // 2, os.SEEK_END)
        data = file.read()
    _, begin, kept = data.partition(_ENTRY)
    with contextlib.suppress(OutputFileError), atomic_path(os.path.realpath(path)) as temporary:
        temporary.touch(0o600)
        temporary.write_bytes(begin + kept)
