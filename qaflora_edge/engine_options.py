"""The options of an Engine, checked before anything is loaded."""

from __future__ import annotations

from numbers import Integral

from qaflora_edge.backend.context import KV_TYPES, MAX_CTX, MAX_THREADS
from qaflora_edge.errors import OptionError
from qaflora_edge.inference.sampling import MAX_SEED

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


def check_answers(n: object, seed: object) -> None:
    """Raise OptionError unless n is a number of answers, and seed a seed or None."""
    if isinstance(n, bool) or not isinstance(n, Integral) or int(n) < 1:
        raise OptionError(f"Option n is {n!r}, expected a number of answers from 1 on.")
    if seed is not None and not (isinstance(seed, Integral) and 0 <= int(seed) < MAX_SEED):
        raise OptionError(f"Option seed is {seed!r}, expected from 0 to {MAX_SEED - 1}.")
