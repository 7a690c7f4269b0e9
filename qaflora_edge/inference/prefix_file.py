"""What was read of a prompt's beginning, in a file of this machine's cache.

A line of JSON says what it was read with and has the hash of what follows, the KV state of each
sequence. The file is named by those facts: another build, base, adapter or option has another file.
It lies in the user's own cache, for a KV state is the library's memory, which nothing can check:
such a file from elsewhere must not be read.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qaflora_edge.backend.probe_context import KvState
from qaflora_edge.files import atomic_path, cache_dir, make_folder

FOLDER = "prefixes"
_MAX_BYTES = 2 << 30  # of all files; those used the longest ago are removed beyond
_MAX_LINE = 8 << 20

Facts = Mapping[str, Any]  # what JSON holds


def prefix_path(facts: Facts) -> Path:
    """Where the state of these facts is kept, if it is."""
    name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
    return cache_dir() / FOLDER / f"{name}.kv"


def write_prefix(facts: Facts, state: KvState) -> Path:
    """Keep a state. Raises OutputFileError."""
    path = prefix_path(facts)
    digest = hashlib.sha256()
    for data in state.sequences:
        digest.update(data.data)
    head = {
        "facts": facts,
        "tokens": state.tokens,
        "weights": [weights.hex() for weights in state.weights],
        "sizes": [data.size for data in state.sequences],
        "sha256": digest.hexdigest(),
    }
    make_folder(path.parent, "the environment variable QAFLORA_CACHE")
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(json.dumps(head).encode() + b"\n")
        for data in state.sequences:
            file.write(data.data)
    _remove_oldest(path.parent, keep=path)
    return path


def read_prefix(facts: Facts) -> KvState | None:
    """The state that was kept, or None. A file that was cut or changed is removed."""
    path = prefix_path(facts)
    try:
        with path.open("rb") as file:
            line = file.readline(_MAX_LINE)
            data = np.frombuffer(file.read(), np.uint8)
        os.utime(path)
    except OSError:
        return None
    try:
        head = json.loads(line)
        sizes, sha256 = head["sizes"], head["sha256"]
        is_whole = head["facts"] == facts and hashlib.sha256(data.data).hexdigest() == sha256
    except (ValueError, KeyError, TypeError):
        is_whole = False
    if not is_whole:
        with contextlib.suppress(OSError):
            path.unlink()
        return None
    ends = np.cumsum(sizes)
    sequences = [data[end - size : end] for size, end in zip(sizes, ends, strict=True)]
    return KvState(head["tokens"], sequences, [bytes.fromhex(each) for each in head["weights"]])


def _remove_oldest(folder: Path, keep: Path) -> None:
    """Remove the files used the longest ago, until the others are few enough."""
    with contextlib.suppress(OSError):  # another process tidies up as well
        files = sorted(folder.glob("*.kv"), key=lambda file: file.stat().st_mtime)
        n_byte = sum(file.stat().st_size for file in files)
        for file in files:
            if n_byte > _MAX_BYTES and file != keep:
                n_byte -= file.stat().st_size
                file.unlink()
