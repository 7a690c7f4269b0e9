"""The options of an Engine, checked before anything is loaded."""

from __future__ import annotations

from qaflora_edge.backend.context import KV_TYPES, MAX_CTX, MAX_THREADS
from qaflora_edge.errors import OptionError

_THREADS_RANGE = f"a number of threads from 1 to {MAX_THREADS}"


def check_options(n_ctx: int, threads: int | None, kv_type: str, probe_tail: int) -> None:
    """Raise OptionError for the first option that is out of its range."""
    checks = (
        ("n_ctx", n_ctx, 1 <= n_ctx <= MAX_CTX, f"a number of tokens from 1 to {MAX_CTX}"),
        ("threads", threads, threads is None or 1 <= threads <= MAX_THREADS, _THREADS_RANGE),
        ("kv_type", kv_type, kv_type in KV_TYPES, f"one of {', '.join(KV_TYPES)}"),
        ("probe_tail", probe_tail, probe_tail >= 0, "0 (off) or a number of tokens"),
    )
    for name, value, is_good, expected in checks:
        if not is_good:
            raise OptionError(f"Option {name} is {value!r}, expected {expected}.")
