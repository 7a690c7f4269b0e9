"""The probe: one query through the base and through each adapter alone, in one batch.

The work is cut at micro-batches: what computes is a generator that yields between them, so that
whoever drives it can decode other people's tokens in between.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from qaflora_edge.backend.batch import Outputs
from qaflora_edge.backend.context import N_UBATCH
from qaflora_edge.backend.model import Model, Pack
from qaflora_edge.backend.probe_context import KvState, ProbeContext
from qaflora_edge.errors import BackendError
from qaflora_edge.formats.adapter_gguf import AdapterInfo
from qaflora_edge.weighing import numbers
from qaflora_edge.weighing.query_projection import QueryProjections
from qaflora_edge.weighing.strategy import Measure, Query

T = TypeVar("T")
F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
Steps = Generator[None, None, T]  # yields between micro-batches, returns what it computed

_N_CTX_MIN = 256  # tokens; a context grows by doubling


@dataclass(frozen=True)
class ProbeTimings:
    """Where the last probe's time went, in milliseconds; 0 for what it did not need."""

    forward_ms: float = 0.0
    lens_ms: float = 0.0
    divergence_ms: float = 0.0


class Prober:
    """Sequences of one context: the base first, then adapters alone at weight 1.

    files of the adapters, where they were read before
    tail  0, or how many tokens at the query's end the adapters run over: those before it are
          read by the base alone, and adapters attend to what the base made of them

    The context is made when first needed and replaced by a larger one for a longer query. A query
    that goes on where the last one ended costs its new tokens only. The states of the last query
    are kept, so that two measures of one query cost one pass.

    rows, in all methods: which adapters of the pack are probed, in ascending order.
    """

    def __init__(
        self,
        model: Model,
        pack: Pack,
        options: dict[str, Any],
        *,
        tail: int = 0,
        files: Sequence[Path | AdapterInfo] | None = None,
    ) -> None:
        self._files = files or pack.paths
        self._model, self._pack, self._options, self._tail = model, pack, options, tail
        self._context: ProbeContext | None = None
        self._pool = "last"  # what the context has room for; "mean" includes it
        self._rows: tuple[int, ...] = ()  # of the adapters whose KV state is held
        self._is_exact = True  # whether the adapters themselves read all that they hold
        self._base: ProbeContext | None = None  # for what needs the base alone
        self._projections: dict[tuple[int, ...], QueryProjections] = {}
        self._last: tuple[tuple[int, ...], tuple[int, ...], str, F32] | None = None
        self.timings = ProbeTimings()

    def close(self) -> None:
        for context in (self._context, self._base):
            if context is not None:
                context.close()
        self._context = self._base = self._last = None

    @property
    def contexts(self) -> list[ProbeContext]:
        """The contexts that there are."""
        return [context for context in (self._context, self._base) if context is not None]

    def states(self, tokens: Sequence[int], rows: Sequence[int], pool: str) -> Steps[F32]:
        """States after each block: float32 [1 + n_row, n_layer, n_embd], the base first.

        pool  "last" token of the query, or the "mean" state over its tokens
        """
        key = (tuple(tokens), tuple(rows), pool)
        if self._last is not None and self._last[:3] == key:
            return self._last[3]
        start = time.perf_counter()
        context = self._room_for(tokens, pool)
        try:
            self._use(context, key[1])
            context.capture_begin(pool)
            if pool == "mean":
                yield from self._read(context, tokens, n_kept=0, outputs="all")
            elif 0 < self._tail < len(tokens):
                yield from self._read_tail(context, tokens)
            else:
                n_kept = _n_going_on(context, tokens, len(tokens) - 1) if self._is_exact else 0
                yield from self._read(context, tokens, n_kept=n_kept)
            states = np.stack([context.states(seq) for seq in range(1 + len(rows))])
        except BaseException:  # GeneratorExit of a cancelled query included
            context.clear()
            raise
        self._check_finite(states, key[1])
        self._last = (*key, states)
        self.timings = ProbeTimings(forward_ms=1e3 * (time.perf_counter() - start))
        return states

    def divergence(
        self, tokens: Sequence[int], rows: Sequence[int], measure: Measure, lens: str, pool: str
    ) -> Steps[F64]:
        """How far each adapter moves the base: float64 [n_row, n_layer].

        measure  "cosine" and "euclidean" distances of states, else KL in nats through the lens
        """
        self.timings = ProbeTimings()
        states = yield from self.states(tokens, rows, pool)
        if measure == "cosine":
            return numbers.cosine_distance(states[0], states[1:])
        if measure == "euclidean":
            return numbers.euclidean_distance(states[0], states[1:])
        if self.timings.forward_ms:
            yield
        context = self._room_for(tokens, pool)
        before = context.lens_ms
        divergence = context.divergence(states[0], states[1:], lens)
        lens_ms, divergence_ms = np.subtract(context.lens_ms, before)
        self.timings = ProbeTimings(self.timings.forward_ms, float(lens_ms), float(divergence_ms))
        return divergence

    def norms(self, tokens: Sequence[int], rows: Sequence[int]) -> Steps[F64]:
        """How much each adapter adds to a late query projection: float64 [n_row].

        |scale B A x| for the last token's x in one pass of the base alone (after LoGo,
        arXiv 2511.07129).

        Raises StrategyError when the adapters have no query projection in common.
        """
        start = time.perf_counter()
        key = tuple(rows)
        if key not in self._projections:
            files = [self._files[row] for row in rows]
            self._projections = {key: QueryProjections(files, self._model.n_layer)}
        if self._base is None or self._base.n_ctx < len(tokens):
            state, self._base = _closed(self._base, tokens), None
            self._base = self._make(len(tokens), state, n_seq=1, has_inputs=True)
        self._base.capture_begin()
        n_kept = _n_going_on(self._base, tokens, len(tokens) - 1)
        try:
            yield from _decode(self._base, tokens, n_kept, "last", n_seq=1)
        except BaseException:
            self._base.clear()
            raise
        norms = self._projections[key].norms(self._base.inputs(0))
        self.timings = ProbeTimings(forward_ms=1e3 * (time.perf_counter() - start))
        return norms

    def _check_finite(self, states: F32, rows: Sequence[int]) -> None:
        if np.isfinite(states).all():
            return
        seq, layer = (int(index[0]) for index in np.nonzero(~np.isfinite(states))[:2])
        path = self._pack.paths[rows[seq - 1]] if seq else self._model.path
        raise BackendError(
            f"The state after block {layer} is NaN or infinite with {path}, expected finite "
            "numbers; convert or fetch it again, or leave it out."
        )

    def _read(
        self,
        context: ProbeContext,
        tokens: Sequence[int],
        *,
        n_kept: int,
        outputs: Outputs = "last",
    ) -> Steps[None]:
        if n_kept == 0:
            context.clear()
        self._is_exact = True
        yield from _decode(context, tokens, n_kept, outputs, n_seq=1 + len(self._rows))

    def _read_tail(self, context: ProbeContext, tokens: Sequence[int]) -> Steps[None]:
        n_head, n_seq = len(tokens) - self._tail, 1 + len(self._rows)
        n_kept = _n_going_on(context, tokens, n_head)
        if n_kept < n_head:
            yield from _decode(context, tokens[:n_head], n_kept, "none", n_seq=1)
        context.share(range(1, n_seq))
        self._is_exact = False
        yield from _decode(context, tokens, n_head, "last", n_seq=n_seq)

    def _use(self, context: ProbeContext, rows: tuple[int, ...]) -> None:
        """Let sequence 1 + i be the adapter rows[i]; what was read with others is forgotten."""
        if rows != self._rows:
            context.clear()
            self._set_weights(context, rows)
            self._rows = rows

    def _set_weights(self, context: ProbeContext, rows: tuple[int, ...]) -> None:
        for i, row in enumerate(rows):
            alone = np.zeros((self._pack.n_adapter, self._model.n_layer), np.float32)
            alone[row] = 1.0
            context.set_weights(alone, seq=1 + i)

    def _room_for(self, tokens: Sequence[int], pool: str) -> ProbeContext:
        if self._context is not None and (
            self._context.n_ctx >= len(tokens) and pool in (self._pool, "last")
        ):
            return self._context
        state, self._context = _closed(self._context, tokens), None
        n_adapter, self._pool = self._pack.n_adapter, pool
        context = self._make(
            len(tokens),
            state,
            n_seq=1 + n_adapter,
            is_differential=n_adapter > 0,
            all_outputs=pool == "mean",
        )
        self._set_weights(context, self._rows)
        self._context = context
        return context

    def _make(self, n_token: int, state: KvState | None, **kwargs: Any) -> ProbeContext:
        n_ctx = _N_CTX_MIN
        while n_ctx < n_token:
            n_ctx *= 2
        context = ProbeContext(self._model, self._pack, n_ctx=n_ctx, **kwargs, **self._options)
        try:
            if state is not None:
                context.load_kv_state(state)
        except BackendError:
            context.close()
            raise
        return context


class QueryProbe:
    """What a strategy may measure of one query: strategy.Probe over a Prober.

    run  drives a generator to its end, and gives what it returns
    """

    def __init__(
        self, prober: Prober, query: Query, rows: Sequence[int], run: Callable[[Steps[Any]], Any]
    ) -> None:
        self._prober, self._query, self._rows, self._run = prober, query, tuple(rows), run

    def divergence(self, measure: Measure = "kl") -> F64:
        query = self._query
        divergence: F64 = self._run(
            self._prober.divergence(query.tokens, self._rows, measure, query.lens, query.pool)
        )
        return divergence

    def states(self) -> F32:
        query = self._query
        states: F32 = self._run(self._prober.states(query.tokens, self._rows, query.pool))
        return states

    def norms(self) -> F64:
        norms: F64 = self._run(self._prober.norms(self._query.tokens, self._rows))
        return norms


def run_alone(steps: Steps[T]) -> T:
    """Drive a generator to its end with nothing in between."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: T = end.value
            return result


def _decode(
    context: ProbeContext, tokens: Sequence[int], start: int, outputs: Outputs, *, n_seq: int
) -> Steps[None]:
    """Run tokens[start:] through the first n_seq sequences, a micro-batch at a time.

    llama.cpp would cut at the same places: each micro-batch has as many tokens of each sequence.
    """
    size = max(1, N_UBATCH // n_seq)
    for at in range(start, len(tokens), size):
        piece = tokens[at : at + size]
        is_last = at + size >= len(tokens)
        context.decode(
            piece, start=at, outputs=outputs if is_last or outputs == "all" else "none", n_seq=n_seq
        )
        if not is_last:
            yield


def _closed(context: ProbeContext | None, tokens: Sequence[int]) -> KvState | None:
    """Close a context that has too little room; gives its KV state, if a query goes on from it."""
    if context is None:
        return None
    state = context.kv_state() if _goes_on(context, tokens) else None
    context.close()
    return state


def _goes_on(context: ProbeContext, tokens: Sequence[int]) -> bool:
    held = context.tokens
    return 0 < len(held) < len(tokens) and list(tokens[: len(held)]) == held


def _n_going_on(context: ProbeContext, tokens: Sequence[int], n_most: int) -> int:
    """How many tokens, n_most at most, need not be read again; what is held besides is forgotten.

    Only a query that begins with all of the last one's tokens is taken to go on. Another query's
    weights do not depend on what was asked before, not even in their last digits.
    """
    if not _goes_on(context, tokens):
        context.clear()
        return 0
    return context.keep_common(tokens[: n_most + 1])
