"""How much memory there is for another bundle, and how much one takes."""

import contextlib
from pathlib import Path
from typing import Any

import psutil

from qaflora_edge.backend.model import is_shared
from qaflora_edge.bundles.open import base_of, is_base, read_bundle_text
from qaflora_edge.errors import QafloraError
from qaflora_edge.formats.gguf import kv_bytes, read_gguf_header

_CGROUP = Path("/sys/fs/cgroup")


def available_bytes() -> float:
    """Memory that can be had without swapping: of the machine, and of a container around us.

    Files that are mapped count as free, for the system can drop them: bases are.
    """
    found = [float(psutil.virtual_memory().available)]
    with contextlib.suppress(OSError, ValueError):
        most = (_CGROUP / "memory.max").read_text().strip()
        now = int((_CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        if most != "max":
            found.append(float(int(most) - now + int(stat["file"])))
    return min(found)


def base_id(place: Path) -> tuple[Path | None, int]:
    """The file of a bundle's base, and its size; 0 where it is not here any more."""
    try:
        path = base_of(place)
        return (None, 0) if path is None else (path.resolve(), path.stat().st_size)
    except (QafloraError, OSError):
        return None, 0


def needed_bytes(place: Path, engine: dict[str, Any]) -> float:
    """About how much memory opening a bundle takes; a base that is loaded already is not counted.

    engine  keywords of Engine
    """
    try:
        path = base_of(place)
        if path is None:
            return 0
        header = read_gguf_header(path)
        n_token = engine["n_ctx"] * engine["n_parallel"]
        needed: float = kv_bytes(header, engine.get("kv_type", "f16")) * n_token
        if not is_base(place):
            text = read_bundle_text(place)
            needed += sum((place / each.file).stat().st_size for each in text.adapters)
        return needed + (0 if is_shared(path, engine) else path.stat().st_size)
    except (QafloraError, OSError):  # opening the bundle says what is wrong
        return 0
