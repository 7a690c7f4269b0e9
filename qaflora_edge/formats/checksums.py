"""Recorded checksums: sizes are compared always, a hash once per state of a file.

Which files were hashed is remembered in the cache folder with their state: inode, size, and the
times of the last change of content and of anything else. A program can set back the first of these
times, not the second. The memory may be lost, broken or read-only at any time: then files are
hashed again.
"""

import contextlib
import json
import os
import time
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
# A file changed twice within the clock's grain shows one time: too young to be remembered.
YOUNG_NS = 2_000_000_000

FileState = tuple[int, int, int, int]  # inode, size, mtime, ctime; times in ns


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

    what  the file's role in messages, such as "the adapter math"

    Raises ChecksumError when the size or the hash differs, or the file changes meanwhile,
    InputFileError when it cannot be read.
    """
    started_ns = time.time_ns()
    before = file_state(path)
    if before is not None and size_bytes is not None and before[1] != size_bytes:
        if is_lfs_pointer(path):
            advice = f"It is a Git LFS pointer, which stands for the file. {LFS_ADVICE}"
        raise ChecksumError(
            f"{what} is not the file that was recorded: {path} has {before[1]} bytes, "
            f"expected {size_bytes} as {recorded_in} says. {advice}"
        )
    if not always_hash and before is not None and _recall(path, before) == sha256:
        return before
    found = sha256_file(path, progress)
    if found != sha256:
        raise ChecksumError(
            f"{what} is not the file that was recorded: {path} has the SHA-256 {found}, "
            f"expected {sha256} as {recorded_in} says. {advice}"
        )
    if before is None:
        raise _changed(path)
    check_unchanged({path: before})
    _remember(path, before, found, started_ns)
    return before


def check_unchanged(states: Mapping[Path, FileState]) -> None:
    """Compare files with the states they were in when they were checked.

    Raises ChecksumError naming the first that was written, replaced or renamed since.
    """
    for path, state in states.items():
        if file_state(path) != state:
            raise _changed(path)


def hash_file(path: Path, progress: TellBytes | None = None) -> str:
    """Hash a file and note the hash, so that the next load need not compute it.

    Raises ChecksumError when the file changes meanwhile, InputFileError when it cannot be read.
    """
    started_ns = time.time_ns()
    before = file_state(path)
    found = sha256_file(path, progress)
    if before is None:
        raise _changed(path)
    check_unchanged({path: before})
    _remember(path, before, found, started_ns)
    return found


def checksum(path: Path) -> str:
    """The hash of a file: as it was noted for this state of it, else computed and noted."""
    state = file_state(path)
    noted = None if state is None else _recall(path, state)
    return noted if isinstance(noted, str) else hash_file(path)


def _changed(path: Path) -> ChecksumError:
    return ChecksumError(
        f"The file {path} was changed or replaced while it was being read; expected one that "
        "stays as it is. Wait until nothing writes to it, and try again."
    )


def file_state(path: Path) -> FileState | None:
    """The state that a file is in; None where it cannot be looked at."""
    try:
        status = os.stat(path)
    except OSError:
        return None  # hashing will say what is wrong
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


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


def _remember(path: Path, state: FileState, sha256: str, started_ns: int) -> None:
    """Note a hash whose computation began at started_ns, when the file was in this state."""
    if started_ns - max(state[2:]) < YOUNG_NS:
        return
    memory = _read_memory()
    key = str(path.resolve())
    memory.pop(key, None)
    memory[key] = [*state, sha256]
    recent = dict(list(memory.items())[-MAX_REMEMBERED:])
    with contextlib.suppress(OSError, QafloraError):
        cache_dir().mkdir(parents=True, exist_ok=True)
        write_text_atomic(cache_dir() / MEMORY_FILE, json.dumps(recent, indent=0) + "\n")
