"""Recorded checksums: a file is hashed once per size and time of change.

Hashes are remembered in the cache folder. The memory may be lost, broken or read-only at any time:
then files are hashed again. A program that sets a file's time back hides its change from this
memory, not from `qaflora bundle verify`.
"""

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from qaflora_edge.errors import ChecksumError, QafloraError
from qaflora_edge.files import (
    LFS_ADVICE,
    cache_dir,
    is_lfs_pointer,
    read_input,
    sha256_file,
    write_text_atomic,
)
from qaflora_edge.progress import TellBytes

MEMORY_FILE = "checked.json"
MAX_MEMORY_BYTES = 4 << 20
MAX_REMEMBERED = 1000

FileState = tuple[int, int]  # bytes, and the time of the last change in ns


def check_file(
    path: Path,
    *,
    what: str,
    sha256: str,
    size_bytes: int | None,
    recorded_in: str,
    advice: str,
    always_hash: bool = False,
    progress: TellBytes | None = None,
) -> FileState:
    """Compare a file with its record; give the state that was compared.

    what         the file's role in messages, such as "the adapter math"
    always_hash  hash it even when its hash is remembered

    Raises ChecksumError when the size or the hash differs, or the file changes in the process;
    InputFileError when it cannot be read.
    """
    state = file_state(path)
    if state is not None and size_bytes is not None and state[0] != size_bytes:
        if is_lfs_pointer(path):
            advice = f"It is a Git LFS pointer, which stands for the file. {LFS_ADVICE}"
        raise ChecksumError(
            f"{what} is not the file that was recorded: {path} has {state[0]} bytes, "
            f"expected {size_bytes} as {recorded_in} says. {advice}"
        )
    if state is not None and not always_hash and _recall(path, state) == sha256:
        return state
    state, found = _hash(path, progress)
    if found != sha256:
        raise ChecksumError(
            f"{what} is not the file that was recorded: {path} has the SHA-256 {found}, "
            f"expected {sha256} as {recorded_in} says. {advice}"
        )
    return state


def check_unchanged(states: Mapping[Path, FileState]) -> None:
    """Compare files with the states they were in when they were checked.

    Raises ChecksumError naming the first that was written, replaced or renamed since.
    """
    for path, state in states.items():
        if file_state(path) != state:
            raise _changed(path)


def hash_file(path: Path, progress: TellBytes | None = None) -> str:
    """Hash a file and remember the hash.

    Raises ChecksumError when the file changes in the process, InputFileError when it cannot be
    read.
    """
    return _hash(path, progress)[1]


def checksum(path: Path) -> str:
    """Give the hash of a file, remembered or computed."""
    state = file_state(path)
    known = None if state is None else _recall(path, state)
    return known if isinstance(known, str) else hash_file(path)


def _hash(path: Path, progress: TellBytes | None) -> tuple[FileState, str]:
    state = file_state(path)
    found = sha256_file(path, progress)
    if state is None or file_state(path) != state:
        raise _changed(path)
    _remember(path, state, found)
    return state, found


def _changed(path: Path) -> ChecksumError:
    return ChecksumError(
        f"The file {path} was changed or replaced while it was being read; expected one that "
        "stays as it is. Wait until nothing writes to it, and try again."
    )


def file_state(path: Path) -> FileState | None:
    """Give a file's size and time of change; None where it cannot be examined."""
    try:
        status = os.stat(path)
    except OSError:
        return None  # hashing will say what is wrong
    return status.st_size, status.st_mtime_ns


def _read_memory() -> dict[str, list[object]]:
    path = cache_dir() / MEMORY_FILE
    try:
        memory = json.loads(read_input(path, MAX_MEMORY_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return memory if isinstance(memory, dict) else {}


def _recall(path: Path, state: FileState) -> object:
    entry = _read_memory().get(str(path.resolve()))
    if isinstance(entry, list) and entry[:-1] == list(state):
        return entry[-1]
    return None


def _remember(path: Path, state: FileState, sha256: str) -> None:
    memory = _read_memory()
    key = str(path.resolve())
    memory.pop(key, None)
    memory[key] = [*state, sha256]
    recent = dict(list(memory.items())[-MAX_REMEMBERED:])
    with contextlib.suppress(OSError, QafloraError):
        cache_dir().mkdir(parents=True, exist_ok=True)
        write_text_atomic(cache_dir() / MEMORY_FILE, json.dumps(recent, indent=0) + "\n")
