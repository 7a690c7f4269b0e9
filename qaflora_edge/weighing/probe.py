"""The probe: one query through the base and through each adapter alone, in one batch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qaflora_edge.backend.context import Context, Held
from qaflora_edge.backend.model import Model, Pack
from qaflora_edge.errors import BackendError
from qaflora_edge.weighing import numbers as fuse
from qaflora_edge.weighing.query_projection import QueryProjections

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

_N_CTX_MIN = 256  # tokens; a context grows by doubling


@dataclass(frozen=True)
class ProbeTimings:
    """Where the last probe's time went, in milliseconds; 0 for what it did not need."""

    forward_ms: float = 0.0
    lens_ms: float = 0.0
    divergence_ms: float = 0.0


class Prober:
    """Sequences of one context: the base first, then each adapter alone at weight 1.

    tail  0, or how many tokens at the query's end the adapters run over: those before it are
          read by the base alone, and adapters attend to what the base made of them

    The context is made when first needed and replaced by a larger one for a longer query. A query
    that goes on where the last one ended costs its new tokens only. The states of the last query
    are kept, so that two measures of one query cost one pass.
    """

    def __init__(self, model: Model, pack: Pack, options: dict[str, Any], *, tail: int = 0) -> None:
        self._model, self._pack, self._options, self._tail = model, pack, options, tail
        self._rows = tuple(range(pack.n_adapter))  # of the pack, that are probed
        self._context: Context | None = None
        self._pool = "last"  # what the context has room for; "mean" includes it
        self._is_exact = True  # whether the adapters themselves read all that they hold
        self._base: Context | None = None  # for what needs the base alone
        self._projections: QueryProjections | None = None
        self._last: tuple[tuple[int, ...], str, F32] | None = None
        self.timings = ProbeTimings()

    @property
    def n_layer(self) -> int:
        return self._model.n_layer

    def close(self) -> None:
        for context in (self._context, self._base):
            if context is not None:
                context.close()
        self._context = self._base = self._last = None

    def use(self, rows: Sequence[int]) -> None:
        """Probe only these adapters of the pack from now on: every first axis is theirs."""
        if tuple(rows) != self._rows:
            self.close()
            self._rows, self._projections = tuple(rows), None

    def states(self, tokens: Sequence[int], pool: str) -> F32:
        """States after each block: float32 [1 + n_adapter, n_layer, n_embd], the base first.

        pool  "last" token of the query, or the "mean" state over its tokens
        """
        key = tuple(tokens)
        if self._last is not None and self._last[:2] == (key, pool):
            return self._last[2]
        start = time.perf_counter()
        context = self._room_for(tokens, pool)
        context.capture_begin(pool)
        if pool == "mean":
            self._read(context, tokens, n_kept=0, outputs="all")
        elif 0 < self._tail < len(tokens):
            self._read_tail(context, tokens)
        else:
            n_kept = _n_going_on(context, tokens, len(tokens) - 1) if self._is_exact else 0
            self._read(context, tokens, n_kept=n_kept)
        states = np.stack([context.states(seq) for seq in range(context.n_seq)])
        self._check_finite(states)
        self._last = (key, pool, states)
        self.timings = ProbeTimings(forward_ms=1e3 * (time.perf_counter() - start))
        return states

    def divergence(self, tokens: Sequence[int], kind: str, lens: str, pool: str) -> F64:
        """How far each adapter moves the base: float64 [n_adapter, n_layer].

        kind  "cosine" and "euclidean" distances of states, else KL in nats through the lens
        """
        self.timings = ProbeTimings()
        states = self.states(tokens, pool)
        if kind == "cosine":
            return fuse.cosine_distance(states[0], states[1:])
        if kind == "euclidean":
            return fuse.euclidean_distance(states[0], states[1:])
        context = self._room_for(tokens, pool)
        before = context.lens_ms
        divergence = context.divergence(states[0], states[1:], lens)
        lens_ms, divergence_ms = np.subtract(context.lens_ms, before)
        self.timings = ProbeTimings(self.timings.forward_ms, float(lens_ms), float(divergence_ms))
        return divergence

    def norms(self, tokens: Sequence[int]) -> F64:
        """How much each adapter adds to a late query projection: float64 [n_adapter].

        |scale B A x| for the last token's x in one pass of the base alone (after LoGo,
        arXiv 2511.07129).

        Raises StrategyError when the adapters have no query projection in common.
        """
        start = time.perf_counter()
        if self._projections is None:
            paths = [self._pack.paths[row] for row in self._rows]
            self._projections = QueryProjections(paths, self._model.n_layer)
        if self._base is None or self._base.n_ctx < len(tokens):
            held, self._base = _closed(self._base, tokens), None
            self._base = self._make(len(tokens), held, n_seq=1, inputs=True)
        self._base.capture_begin()
        n_kept = _n_going_on(self._base, tokens, len(tokens) - 1)
        self._base.decode(tokens[n_kept:], start=n_kept)
        norms = self._projections.norms(self._base.inputs(0))
        self.timings = ProbeTimings(forward_ms=1e3 * (time.perf_counter() - start))
        return norms

    def _check_finite(self, states: F32) -> None:
        if np.isfinite(states).all():
            return
        seq, layer = (int(index[0]) for index in np.nonzero(~np.isfinite(states))[:2])
        path = self._pack.paths[self._rows[seq - 1]] if seq else self._model.path
        raise BackendError(
            f"The state after block {layer} is NaN or infinite with {path}, expected finite "
            "numbers; convert or fetch it again, or leave it out."
        )

    def _read(
        self, context: Context, tokens: Sequence[int], *, n_kept: int, outputs: str = "last"
    ) -> None:
        if n_kept == 0:
            context.clear()
        self._is_exact = True
        context.decode(tokens[n_kept:], start=n_kept, outputs=outputs)

    def _read_tail(self, context: Context, tokens: Sequence[int]) -> None:
        n_head = len(tokens) - self._tail
        n_kept = _n_going_on(context, tokens, n_head)
        if n_kept < n_head:
            context.decode(tokens[n_kept:n_head], start=n_kept, outputs="none", n_seq=1)
        context.copy_first()
        self._is_exact = False
        context.decode(tokens[n_head:], start=n_head)

    def _room_for(self, tokens: Sequence[int], pool: str) -> Context:
        if self._context is not None and (
            self._context.n_ctx >= len(tokens) and pool in (self._pool, "last")
        ):
            return self._context
        held, self._context = _closed(self._context, tokens), None
        n_adapter, self._pool = len(self._rows), pool
        context = self._make(
            len(tokens),
            held,
            n_seq=1 + n_adapter,
            differential=n_adapter > 0,
            all_outputs=pool == "mean",
        )
        for ia, row in enumerate(self._rows):
            alone = np.zeros((self._pack.n_adapter, self._model.n_layer), np.float32)
            alone[row] = 1.0
            context.set_weights(alone, seq=1 + ia)
        self._context = context
        return context

    def _make(self, n_token: int, held: Held | None, **kwargs: Any) -> Context:
        n_ctx = _N_CTX_MIN
        while n_ctx < n_token:
            n_ctx *= 2
        context = Context(
            self._model, self._pack, n_ctx=n_ctx, probe=True, **kwargs, **self._options
        )
        try:
            if held is not None:
                context.hold(held)
        except BackendError:
            context.close()
            raise
        return context


def _closed(context: Context | None, tokens: Sequence[int]) -> Held | None:
    """Close a context that has too little room; gives what it held, if a query goes on from it."""
    if context is None:
        return None
    held = context.held() if _goes_on(context, tokens) else None
    context.close()
    return held


def _goes_on(context: Context, tokens: Sequence[int]) -> bool:
    held = context.tokens
    return 0 < len(held) < len(tokens) and list(tokens[: len(held)]) == held


def _n_going_on(context: Context, tokens: Sequence[int], n_most: int) -> int:
    """How many tokens, n_most at most, need not be read again; what is held besides is forgotten.

    Only a query that begins with all of the last one's tokens is taken to go on. Another query's
    weights do not depend on what was asked before, not even in their last digits.
    """
    if not _goes_on(context, tokens):
        context.clear()
        return 0
    return context.keep_common(tokens[: n_most + 1])
