"""Reading a query in a context whose states are captured, in steps.

The work is cut at micro-batches: what computes is a generator that yields between them, so that
whoever drives it can decode other people's tokens in between.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from qaflora_edge.backend.batch import Outputs
from qaflora_edge.backend.model import Model, Pack
from qaflora_edge.backend.pieces import pieces_of
from qaflora_edge.backend.probe_context import KvState, ProbeContext
from qaflora_edge.errors import BackendError

T = TypeVar("T")
Steps = Generator[None, None, T]  # yields between micro-batches, returns what it computed

_N_CTX_MIN = 256  # tokens; a context grows by doubling


@dataclass(frozen=True)
class ProbeTimings:
    """Where the last probe's time went, in milliseconds; 0 for what it did not need."""

    forward_ms: float = 0.0
    lens_ms: float = 0.0
    divergence_ms: float = 0.0


def run_alone(steps: Steps[T]) -> T:
    """Drive a generator to its end with nothing in between."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: T = end.value
            return result


def probe_context(
    model: Model,
    pack: Pack,
    options: dict[str, Any],
    n_token: int,
    state: KvState | None,
    **kwargs: Any,
) -> ProbeContext:
    """A context with room for so many tokens, which holds a KV state.

    options, kwargs  of ProbeContext
    """
    n_ctx = _N_CTX_MIN
    while n_ctx < n_token:
        n_ctx *= 2
    context = ProbeContext(model, pack, n_ctx=n_ctx, **kwargs, **options)
    try:
        if state is not None:
            context.load_kv_state(state)
    except BackendError:
        context.close()
        raise
    return context


def read_tokens(
    context: ProbeContext, tokens: Sequence[int], start: int, outputs: Outputs, *, n_seq: int
) -> Steps[None]:
    """Run tokens[start:] through the first n_seq sequences, a micro-batch at a time."""
    pieces, at = pieces_of(n_seq), start
    while at < len(tokens):
        end = at + pieces.next(len(tokens) - at)
        is_last = end == len(tokens)
        context.decode(
            tokens[at:end],
            start=at,
            outputs=outputs if is_last or outputs == "all" else "none",
            n_seq=n_seq,
        )
        at = end
        if not is_last:
            yield


def closed(context: ProbeContext | None, tokens: Sequence[int]) -> KvState | None:
    """Close a context that has too little room; gives its KV state, if a query goes on from it."""
    if context is None:
        return None
    state = context.kv_state() if _goes_on(context, tokens) else None
    context.close()
    return state


def _goes_on(context: ProbeContext, tokens: Sequence[int]) -> bool:
    held = context.tokens
    return 0 < len(held) < len(tokens) and list(tokens[: len(held)]) == held


def n_going_on(context: ProbeContext, tokens: Sequence[int], n_most: int) -> int:
    """How many tokens, n_most at most, need not be read again; what is held besides is forgotten.

    Only a query that begins with all of the last one's tokens is taken to go on. Another query's
    weights do not depend on what was asked before, not even in their last digits.
    """
    if not _goes_on(context, tokens):
        context.clear()
        return 0
    return context.keep_common(tokens[: n_most + 1])
