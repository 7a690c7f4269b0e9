"""Recorded checksums: a file is hashed once per size and time of change.

Hashes are remembered in the cache folder; without that memory files are hashed again. A program
that sets a file's time back hides its change from the memory, not from `qaflora bundle verify`.
"""

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from qaflora_edge.errors import ChecksumError, QafloraError
from qaflora_edge.files import cache_dir, write_text_atomic
from qaflora_edge.formats.bundle import AdapterRecord, BaseRecord
from qaflora_edge.formats.inputs import (
    LFS_ADVICE,
    changed,
    is_lfs_pointer,
    read_input,
    reading,
    sha256_file,
)

MEMORY_FILE = "checked.json"
MAX_MEMORY_BYTES = 4 << 20  # a larger memory begins from nothing

FileState = tuple[int, int]  # bytes, and the time of the last change in ns


def check_file(
    path: Path, record: BaseRecord | AdapterRecord, where: str, *, always_hash: bool = False
) -> FileState:
    """Compare a file with its record; give the state that was compared.

    where        names the bundle.json of the record
    always_hash  hash it even when its hash is remembered

    Raises ChecksumError when the size or the hash differs, or the file changes in the process;
    InputFileError when it cannot be read.
    """
    state = file_state(path)
    if record.size_bytes not in (None, state[0]):
        found, expected = f"{state[0]} bytes", str(record.size_bytes)
    else:
        state, digest = _hash(path, always_hash)
        if digest == record.sha256:
            return state
        found, expected = f"the SHA-256 {digest}", record.sha256
    what, advice = "The base", "Give the file that the bundle was made with; adapters fit no other."
    if isinstance(record, AdapterRecord):
        what, advice = f"The adapter {record.name}", "Copy the bundle again."
    if is_lfs_pointer(path):
        advice = f"It is a Git LFS pointer, which stands for the file. {LFS_ADVICE}"
    raise ChecksumError(
        f"{what} is not the file that was recorded: {path} has {found}, expected {expected} as "
        f"{where} says. {advice}"
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


def file_state(path: Path) -> FileState:
    """Give a file's size and time of change. Raises InputFileError."""
    with reading(path):
        status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def _hash(path: Path, always: bool) -> tuple[FileState, str]:
    state, memory, key = file_state(path), _read_memory(), str(path.resolve())
    if not always and key in memory:
        *known, digest = memory[key]
        if known == list(state):
            return state, str(digest)
    found = sha256_file(path)
    check_unchanged({path: state})
    memory[key] = [*state, found]
    with contextlib.suppress(OSError, QafloraError):
        cache_dir().mkdir(parents=True, exist_ok=True)
        write_text_atomic(cache_dir() / MEMORY_FILE, json.dumps(memory, indent=0) + "\n")
    return state, found


def _read_memory() -> dict[str, list[object]]:
    try:
        memory = json.loads(read_input(cache_dir() / MEMORY_FILE, MAX_MEMORY_BYTES))
        return {str(key): list(entry) for key, entry in memory.items() if entry}
    except (OSError, ValueError, RecursionError, AttributeError, TypeError):
        return {}
