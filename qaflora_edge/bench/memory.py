"""Peak memory of one answer, in a process of its own: `python -m qaflora_edge.bench.memory`.

A request comes as JSON on stdin; the measured bytes go as JSON to stdout.
"""

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qaflora_edge.errors import BackendError, OptionError, QafloraError


def measure_memory(
    bundle: Path, tokens: Sequence[int], max_tokens: int, engine: Mapping[str, Any]
) -> dict[str, int]:
    """Answer a prompt once in a new process, and return what it took.

    engine   keywords of Engine
    returns  peak_bytes: the most resident memory; adapters_bytes: what the packed adapters have of
             it

    Raises BackendError when that process fails.
    """
    request = {"bundle": str(bundle), "tokens": list(tokens), "max_tokens": max_tokens}
    done = subprocess.run(
        [sys.executable, "-m", "qaflora_edge.bench.memory"],
        input=json.dumps({**request, "engine": dict(engine)}),
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


def status_bytes(field: str, pid: int | str = "self") -> int | None:
    """A size in Linux's account of a process; unlike ru_maxrss it knows no parent's peak."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    match = re.search(rf"^{field}:\s+(\d+) kB$", text, re.M)
    return 1024 * int(match[1]) if match else None


def main() -> None:
    """Answer the request on stdin."""
    from qaflora_edge.engine import Engine

    request = json.load(sys.stdin)
    try:
        with Engine(request["bundle"], **request["engine"]) as engine:
            engine.generate(request["tokens"], max_tokens=request["max_tokens"]).text()
            measured = {
                "peak_bytes": status_bytes("VmHWM"),
                "adapters_bytes": engine._core.backend.pack.size_bytes,
            }
        if measured["peak_bytes"] is None:
            raise OptionError(
                "Peak memory is measured on Linux only; leave out memory with --only."
            )
    except QafloraError as error:
        sys.exit(" ".join(str(error).splitlines()))
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
