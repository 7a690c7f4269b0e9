"""Input files: regular files, opened, hashed and compared with records.

A file is hashed, and its values are checked, once per size and time of change. The cache folder
remembers that; without it both are done again. A program that sets a file's time back hides its
change from the memory, not from `qaflora bundle verify`.
"""

import contextlib
import errno
import hashlib
import json
import os
import stat
from collections.abc import Mapping
from contextlib import AbstractContextManager
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING

from qaflora_edge import __version__
from qaflora_edge.errors import (
    ChecksumError,
    InputFileError,
    QafloraError,
    os_errors,
)
from qaflora_edge.files import AnyPath, cache_dir, kind_of, write_text_atomic

if TYPE_CHECKING:
    from qaflora_edge.formats.bundle import AdapterRecord, BaseRecord

MEMORY_FILE = "checked.json"
MAX_MEMORY_BYTES = 4 << 20  # a larger memory begins from nothing

FileState = tuple[int, int]  # bytes, and the time of the last change in ns
_LFS_START = b"version https://git-lfs.github.com/spec/"


def open_input(path: AnyPath) -> BufferedReader:
    """Open a regular file to read.

    A named pipe or a device would make a reader wait for ever or never end. Raises OSError for
    what is no regular file, and for the pointer that git leaves where Git LFS is missing.
    """
    # O_NONBLOCK: opening a pipe does not wait for its writer. Files are read as ever.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
    try:
        handle = os.open(path, flags | getattr(os, "O_BINARY", 0))
    except ValueError as error:
        raise OSError(errno.EINVAL, "the path has a null character") from error
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        raise OSError(errno.EINVAL, f"it is {kind_of(mode)}, not a file")
    file = os.fdopen(handle, "rb")
    if file.peek(len(_LFS_START)).startswith(_LFS_START):
        file.close()
        found = "it is a Git LFS pointer; run `git lfs install` and `git lfs pull` in its folder"
        raise OSError(errno.EINVAL, found)
    return file


def reading(path: AnyPath) -> AbstractContextManager[None]:
    """Raise InputFileError in place of the system's error."""
    failure = f"Cannot read {os.fspath(path)}: opening or reading it failed"
    return os_errors(InputFileError, failure, "Check that it exists and that you may read it.")


def changed(path: Path, kind: type[QafloraError]) -> QafloraError:
    """Make the error of a file that was written while it was read."""
    return kind(
        f"Cannot read {path}: it changed while it was read; expected a file that stays as it is. "
        "Try again."
    )


def read_input(path: AnyPath, most: int) -> bytes:
    """Read a regular file whole. Raises OSError, or ValueError where it has more bytes."""
    with open_input(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"it has more than {most} bytes")
    return data


def sha256_file(path: AnyPath) -> str:
    """Hash a file. Raises InputFileError when it cannot be read."""
    with reading(path), open_input(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_file(
    path: Path, record: "BaseRecord | AdapterRecord", where: str, *, always_hash: bool = False
) -> FileState:
    """Compare a file with its record; give the state that was compared.

    where        names the bundle.json of the record
    always_hash  hash it even when its hash is remembered

    Raises ChecksumError when the size or the hash differs, or the file changes in the process;
    InputFileError when it cannot be read.
    """
    state = file_state(path)
    if record.size_bytes not in (None, state[0]):
        with reading(path), open_input(path):
            pass  # it may be a Git LFS pointer
        found, expected = f"{state[0]} bytes", str(record.size_bytes)
    else:
        state, digest = _hash(path, always_hash)
        if digest == record.sha256:
            return state
        found, expected = f"the SHA-256 {digest}", record.sha256
    raise ChecksumError(
        f"{record.title} is not the file that was recorded: {path} has {found}, expected "
        f"{expected} as {where} says. {record.advice}"
    )


def check_unchanged(states: Mapping[Path, FileState]) -> None:
    """Check that files are still those whose states were kept when they were checked.

    Raises ChecksumError naming the first that was written, replaced or renamed since.
    """
    for path, state in states.items():
        if file_state(path) != state:
            raise changed(path, ChecksumError)


def checksum(path: Path) -> str:
    """Give the SHA-256 of a file, remembered or computed. Raises as check_file does."""
    return _hash(path, False)[1]


def passed(states: Mapping[Path, FileState]) -> set[Path]:
    """Find the hashed files that passed every check of this version in these very states."""
    memory = _read_memory()
    entries = {path: memory.get(str(path.resolve()), []) for path in states}
    good = {path: [*state, __version__] for path, state in states.items()}
    return {path for path, entry in entries.items() if [*entry[:2], *entry[3:]] == good[path]}


def remember_passed(states: Mapping[Path, FileState]) -> None:
    """Remember of hashed files that they passed every check."""
    memory = _read_memory()
    entries = [(memory.get(str(path.resolve()), []), state) for path, state in states.items()]
    hashed = [entry for entry, state in entries if entry[:2] == [*state]]
    for entry in hashed:
        entry[3:] = [__version__]
    if hashed:
        _write_memory(memory)


def file_state(path: Path) -> FileState:
    """Give a file's size and time of change. Raises InputFileError."""
    with reading(path):
        status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def _hash(path: Path, always: bool) -> tuple[FileState, str]:
    state, memory, key = file_state(path), _read_memory(), str(path.resolve())
    if not always and key in memory:
        *known, digest = memory[key][:3]
        if known == list(state):
            return state, str(digest)
    found = sha256_file(path)
    check_unchanged({path: state})
    memory[key] = [*state, found]
    _write_memory(memory)
    return state, found


def _read_memory() -> dict[str, list[object]]:
    try:
        memory = json.loads(read_input(cache_dir() / MEMORY_FILE, MAX_MEMORY_BYTES))
        return {str(key): list(entry) for key, entry in memory.items() if entry}
    except (OSError, ValueError, RecursionError, AttributeError, TypeError):
        return {}


def _write_memory(memory: Mapping[str, list[object]]) -> None:
    with contextlib.suppress(OSError, QafloraError):
        cache_dir().mkdir(parents=True, exist_ok=True)
        write_text_atomic(cache_dir() / MEMORY_FILE, json.dumps(memory, indent=0) + "\n")
