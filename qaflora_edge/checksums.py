"""Recorded checksums: sizes are compared always, a hash once per state of a file.

Which files were hashed is remembered in the cache folder as (path, size, mtime). The memory may be
lost, broken or read-only at any time: then files are hashed again.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path

from qaflora_edge.errors import ChecksumError, QafloraError
from qaflora_edge.files import Progress, cache_dir, sha256_file, write_text_atomic

MEMORY_FILE = "checked.json"
MAX_MEMORY_BYTES = 4 << 20
MAX_REMEMBERED = 1000
# A file changed twice within the clock's grain shows one mtime: too young to be remembered.
YOUNG_NS = 2_000_000_000


def check_file(
    path: Path,
    *,
    what: str,
    sha256: str,
    size_bytes: int | None,
    recorded_in: str,
    advice: str,
    always_hash: bool = False,
    progress: Progress | None = None,
) -> None:
    """Compare a file with its record.

    what  the file's role in messages, such as "the adapter math"

    Raises ChecksumError when the size or the hash differs, InputFileError when it cannot be read.
    """
    before = _state(path)
    if before is not None and size_bytes is not None and before[0] != size_bytes:
        raise ChecksumError(
            f"{what} is not the file that was recorded: {path} has {before[0]} bytes, "
            f"expected {size_bytes} as {recorded_in} says. {advice}"
        )
    key = str(path.resolve())
    if not always_hash and before is not None and _recall(key, before) == sha256:
        return
    found = sha256_file(path, progress)
    if found != sha256:
        raise ChecksumError(
            f"{what} is not the file that was recorded: {path} has the SHA-256 {found}, "
            f"expected {sha256} as {recorded_in} says. {advice}"
        )
    if before is not None and before == _state(path):
        _remember(key, before, found)


def remember_hash(path: Path, sha256: str) -> None:
    """Note a hash that was just computed, so that the next load need not compute it."""
    if (state := _state(path)) is not None:
        _remember(str(path.resolve()), state, sha256)


def _state(path: Path) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None  # hashing will say what is wrong
    return status.st_size, status.st_mtime_ns


def _read_memory() -> dict[str, list[object]]:
    path = cache_dir() / MEMORY_FILE
    try:
        with path.open("rb") as file:
            data = file.read(MAX_MEMORY_BYTES + 1)
        memory = json.loads(data) if len(data) <= MAX_MEMORY_BYTES else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return memory if isinstance(memory, dict) else {}


def _recall(key: str, state: tuple[int, int]) -> object:
    entry = _read_memory().get(key)
    if isinstance(entry, list) and len(entry) == 3 and entry[:2] == list(state):
        return entry[2]
    return None


def _remember(key: str, state: tuple[int, int], sha256: str) -> None:
    if time.time_ns() - state[1] < YOUNG_NS:
        return
    memory = _read_memory()
    memory.pop(key, None)
    memory[key] = [*state, sha256]
    recent = dict(list(memory.items())[-MAX_REMEMBERED:])
    with contextlib.suppress(OSError, QafloraError):
        cache_dir().mkdir(parents=True, exist_ok=True)
        write_text_atomic(cache_dir() / MEMORY_FILE, json.dumps(recent, indent=0) + "\n")
