"""Peak memory of one fused answer, in a process of its own: `python -m qaflora_edge.bench.memory`.

A request comes as JSON on stdin, and the measured bytes go as JSON to stdout.
"""

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qaflora_edge.backend.context import Context
from qaflora_edge.errors import BackendError, OptionError, QafloraError


def measure_memory(
    bundle: Path,
    tokens: Sequence[int],
    *,
    max_tokens: int,
    strategy: str | None,
    engine: Mapping[str, Any],
) -> dict[str, int]:
    """Answer a prompt once in a new process, and say what it took.

    engine   keywords of Engine
    returns  peak_bytes: the most memory that was resident; base_bytes, kv_main_bytes,
             kv_probe_bytes, adapters_bytes: what must be there; excess_bytes: the rest of the
             peak; python_bytes: what was resident before the base was loaded, part of the rest

    Raises BackendError when that process fails.
    """
    request = {
        "bundle": str(bundle),
        "tokens": list(tokens),
        "max_tokens": max_tokens,
        "strategy": strategy,
        "engine": dict(engine),
    }
    done = subprocess.run(
        [sys.executable, "-m", "qaflora_edge.bench.memory"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1].removesuffix(".")
        raise BackendError(
            f"The run whose memory is measured ended with code {done.returncode}, expected 0; it "
            f"said: {said}. Try the same options with `qaflora run`."
        )
    measured: dict[str, int] = json.loads(done.stdout)
    return measured


def peak_rss_bytes() -> int:
    """The most memory that this process had resident so far.

    Raises OptionError where the system does not say.
    """
    if (peak := status_bytes("VmHWM")) is not None:
        return peak
    try:
        import resource
    except ImportError as error:
        raise OptionError(
            "Peak memory cannot be measured on this system; leave out memory with --only."
        ) from error
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def status_bytes(field: str, pid: int | str = "self") -> int | None:
    """A size in Linux's account of a process; unlike ru_maxrss it knows no parent's peak."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    match = re.search(rf"^{field}:\s+(\d+) kB$", text, re.M)
    return 1024 * int(match[1]) if match else None


def _measure(request: Mapping[str, Any]) -> dict[str, int]:
    from qaflora_edge.engine import Engine

    python_bytes = peak_rss_bytes()
    with Engine(request["bundle"], strategy=request["strategy"], **request["engine"]) as engine:
        engine.generate(request["tokens"], max_tokens=request["max_tokens"]).text()
        peak_bytes = peak_rss_bytes()
        main, probes = engine._core.context, engine._core.prober.contexts
        cell_bytes = kv_cell_bytes(main)
        parts = {
            "base_bytes": engine._model.path.stat().st_size,
            "kv_main_bytes": round(cell_bytes * n_cell(main)),
            "kv_probe_bytes": round(cell_bytes * sum(n_cell(context) for context in probes)),
            "adapters_bytes": engine._core.pack.size_bytes,
        }
    return {
        "peak_bytes": peak_bytes,
        **parts,
        "excess_bytes": peak_bytes - sum(parts.values()),
        "python_bytes": python_bytes,
    }


def n_cell(context: Context) -> int:
    """Tokens that a context's KV cache has room for, all sequences together."""
    return int(context._lib.llama_n_ctx(context._pointer))


def kv_cell_bytes(context: Context) -> float:
    """Bytes of one token's keys and values in all layers, as llama.cpp would save them.

    Half of what the context holds is forgotten, so that what does not grow with tokens cancels.
    """
    n_all, all_bytes = len(context.tokens), _state_bytes(context)
    n_half = context.keep_common(context.tokens[: n_all // 2 + 1])
    return (all_bytes - _state_bytes(context)) / (n_all - n_half)


def _state_bytes(context: Context) -> int:
    return int(context._lib.llama_state_seq_get_size(context._pointer, 0))


def main() -> None:
    """Answer the request on stdin."""
    try:
        measured = _measure(json.load(sys.stdin))
    except QafloraError as error:
        sys.exit(" ".join(str(error).splitlines()))
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
