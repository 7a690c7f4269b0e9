"""Peak memory of one answer, in a process of its own."""

import multiprocessing
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from qaflora_edge.errors import BackendError, OptionError


def measure_memory(
    bundle: Path, tokens: Sequence[int], max_tokens: int, engine: Mapping[str, Any]
) -> dict[str, int]:
    """Answer a prompt once in a new process, and return what it took.

    engine   keywords of Engine
    returns  peak_bytes: the most resident memory; adapters_bytes: the packed adapters' part of it

    Raises what the Engine raised there, or BackendError when that process died.
    """
    if status_bytes("VmHWM") is None:
        raise OptionError("Peak memory is measured on Linux only; leave out memory with --only.")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(_answer, bundle, list(tokens), max_tokens, dict(engine)).result()
        except BrokenProcessPool as error:
            raise BackendError(
                "The process whose memory is measured died, expected an answer. Perhaps memory is "
                "short: try the same options with `qaflora run`."
            ) from error


def status_bytes(field: str, pid: int | str = "self") -> int | None:
    """A size in Linux's account of a process; unlike ru_maxrss it knows no parent's peak."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    match = re.search(rf"^{field}:\s+(\d+) kB$", text, re.M)
    return 1024 * int(match[1]) if match else None


def _answer(
    bundle: Path, tokens: Sequence[int], max_tokens: int, options: Mapping[str, Any]
) -> dict[str, int]:
    from qaflora_edge.engine import Engine

    with Engine(bundle, **options) as engine:
        engine.generate(tokens, max_tokens=max_tokens).text()
        adapters_bytes = engine._core.backend.pack.size_bytes
        return {"peak_bytes": status_bytes("VmHWM") or 0, "adapters_bytes": adapters_bytes}
