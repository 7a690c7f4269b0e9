"""Reading a query in a context whose states are captured, in steps.

The work is cut at micro-batches: what computes is a generator that yields between them, so that
whoever drives it can decode other people's tokens in between.
"""

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from qaflora_edge.backend.batch import Outputs
from qaflora_edge.backend.context import Context
from qaflora_edge.backend.model import Model, Pack
from qaflora_edge.backend.probe_context import KvState, ProbeContext

T = TypeVar("T")
# Yields between micro-batches how many tokens of a query are read, or None; returns its result.
Steps = Generator[int | None, None, T]

_N_CTX_MIN = 256  # tokens


@dataclass(frozen=True)
class ProbeTimings:
    """Where the last probe's time went, in milliseconds; 0 for what it did not need."""

    forward_ms: float = 0.0
    lens_ms: float = 0.0
    divergence_ms: float = 0.0


class Run(Protocol):
    """Drives a generator to its end, and gives what it returns."""

    def __call__(self, steps: Steps[T], /) -> T: ...


def run_alone(steps: Steps[T]) -> T:
    """Drive a generator to its end with nothing in between."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: T = end.value
            return result


@contextmanager
def wiped_on_failure(context: Context) -> Iterator[None]:
    """Let a context hold nothing where a block fails: a cancelled query's GeneratorExit, too."""
    try:
        yield
    except BaseException:
        context.wipe()
        raise


def n_ctx_for(n_token: int) -> int:
    """How large a context is made for so many tokens: it grows by doubling."""
    return max(_N_CTX_MIN, 1 << (n_token - 1).bit_length())


def probe_context(
    model: Model, pack: Pack, options: dict[str, Any], n_token: int, **kwargs: Any
) -> ProbeContext:
    """A context with room for so many tokens.

    options, kwargs  of ProbeContext
    """
    return ProbeContext(model, pack, n_ctx=n_ctx_for(n_token), **kwargs, **options)


def read_tokens(
    context: ProbeContext, tokens: Sequence[int], start: int, outputs: Outputs, *, n_seq: int
) -> Steps[None]:
    """Run tokens[start:] through the first n_seq sequences, a micro-batch at a time."""
    pieces, at = context.pieces(n_seq), start
    while at < len(tokens):
        end = pieces.end(tokens, at)
        is_last = end == len(tokens)
        context.decode(
            tokens[at:end],
            start=at,
            outputs=outputs if is_last or outputs == "all" else "none",
            n_seq=n_seq,
        )
        at = end
        if not is_last:
            yield at


def closed(context: ProbeContext | None) -> KvState | None:
    """Close a context that has too little room; gives what it holds, for the next one."""
    if context is None:
        return None
    state = context.kv_state() if context.tokens else None
    context.close()
    return state
