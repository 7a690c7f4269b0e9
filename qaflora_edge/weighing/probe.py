"""The probe: one query through the base and through each adapter alone, in one batch."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from qaflora_edge.arrays import F32, F64
from qaflora_edge.backend.batch import Outputs
from qaflora_edge.backend.model import Model, Pack
from qaflora_edge.backend.probe_context import ProbeContext
from qaflora_edge.errors import BackendError
from qaflora_edge.formats.adapter import AdapterInfo
from qaflora_edge.weighing import numbers
from qaflora_edge.weighing.base_probe import BaseProber
from qaflora_edge.weighing.prefixes import Prefixes
from qaflora_edge.weighing.reading import (
    ProbeTimings,
    Run,
    Steps,
    closed,
    probe_context,
    read_tokens,
    wiped_on_failure,
)
from qaflora_edge.weighing.strategy import Measure, PlaceMeasure, Query, Reading, Span

T = TypeVar("T")
PLACES = ("answer", "question")  # the last token, where the answer begins, and the question's mean
# tokens, rows, and where the question stands; None: only the last token's states are captured
_Key = tuple[tuple[int, ...], tuple[int, ...], Span | None]


class Prober:
    """Sequences of one context: the base first, then adapters alone at weight 1.

    files  of the adapters, where they were read before
    prefixes  where what was read of queries is kept; by default the last one's alone

    The context is made when first needed and replaced by a larger one for a longer query. What a
    query begins with is not read again where it was read for another. The states of the last query
    are kept, so that two measures of one query cost one pass. `base` measures with the base alone.

    rows, in all methods: which adapters of the pack are probed, in ascending order.
    """

    def __init__(
        self,
        model: Model,
        pack: Pack,
        options: dict[str, Any],
        *,
        files: Sequence[Path | AdapterInfo] | None = None,
        prefixes: Prefixes | None = None,
    ) -> None:
        self.prefixes = prefixes or Prefixes(0)
        self.base = BaseProber(model, pack, options, files=files, prefixes=self.prefixes)
        self._model, self._pack, self._options = model, pack, options
        self._context: ProbeContext | None = None
        self._rows: tuple[int, ...] = ()  # of the adapters whose KV state is held
        self._n_exact: int | None = None  # tokens held that were read as a prompt is; None: all
        self._last: tuple[_Key, F32] | None = None
        self.timings = ProbeTimings()

    def close(self) -> None:
        self.base.close()
        if self._context is not None:
            self._context.close()
        self._context = self._last = None

    @property
    def contexts(self) -> list[ProbeContext]:
        """The contexts that there are."""
        return [context for context in (self._context, self.base.context) if context is not None]

    def states(self, tokens: Sequence[int], rows: Sequence[int]) -> Steps[F32]:
        """Give the last token's states: float32 [1 + n_row, n_layer, n_embd], the base first."""
        key = (tuple(tokens), tuple(rows), None)
        return self._measured(key, lambda c: self._read_query(c, tokens))

    def _read_query(self, context: ProbeContext, tokens: Sequence[int]) -> Steps[F32]:
        context.capture_begin()
        n_kept = self._go_on(context, tokens)
        self._n_exact = None
        yield from self._read_part(context, tokens, n_kept, "last")
        return self._states(context)

    def _measured(self, key: _Key, read: Callable[[ProbeContext], Steps[F32]]) -> Steps[F32]:
        """The states of a query: those of the last one, or what is read now and kept as these."""
        if self._last is not None and self._last[0] == key:
            return self._last[1]
        start = time.perf_counter()
        context = self._room_for(key[0], all_outputs=key[2] is not None)
        with wiped_on_failure(context):
            self._use(context, key[1])
            states = yield from read(context)
            self._check_finite(states, key[1])
        self._last = (key, states)
        self.timings = ProbeTimings(forward_ms=1e3 * (time.perf_counter() - start))
        return states

    def places(self, tokens: Sequence[int], rows: Sequence[int], span: Span) -> Steps[F32]:
        """States in two places: float32 [2, 1 + n_row, n_layer, n_embd], in one pass.

        span     where the question's tokens stand
        returns  the last token's states, and the means over the question's tokens
        """
        key = (tuple(tokens), tuple(rows), span)
        return self._measured(key, lambda c: self._read_places(c, tokens, span))

    def _read_places(self, context: ProbeContext, tokens: Sequence[int], span: Span) -> Steps[F32]:
        """Read what stands before the question, the question, and the rest, each for itself.

        Where nothing follows the question, its last token is the rest, and counts for the mean too.
        """
        start, end = span
        n_mean = end - start
        n_kept = self._go_on(context, tokens[:start], n_after=len(tokens) - start)
        self._n_exact = start  # what follows is not cut where others are
        if start > n_kept:
            yield from self._read_part(context, tokens[:start], n_kept, "none")
        if end == len(tokens):
            end -= 1
        context.capture_begin("mean")
        if start < end:
            yield from self._read_part(context, tokens[:end], start, "all")
            question = self._states(context)
        context.capture_begin("last")
        yield from self._read_part(context, tokens, end, "last")
        last = self._states(context)
        if start == end:
            question = last
        elif n_mean > end - start:
            question = question + (last - question) / np.float32(n_mean)
        return np.stack([last, question])

    def _read_part(
        self, context: ProbeContext, tokens: Sequence[int], start: int, outputs: Outputs
    ) -> Steps[None]:
        yield from read_tokens(context, tokens, start, outputs, n_seq=1 + len(self._rows))

    def _states(self, context: ProbeContext) -> F32:
        order = self._in_order(self._rows)
        return np.stack(
            [context.states(0), *(context.states(1 + order.index(r)) for r in self._rows)]
        )

    def _in_order(self, rows: tuple[int, ...]) -> list[int]:
        """The adapters as they follow the base: those that begin in a higher layer come later.

        Below where they begin they are what the base is, and the library computes the first
        sequences alone.
        """
        return sorted(rows, key=lambda row: (self._pack.first_layers[row], row))

    def divergence(
        self,
        tokens: Sequence[int],
        rows: Sequence[int],
        measure: Measure,
        lens: str,
        pool: str,
        span: Span = (0, 0),
    ) -> Steps[F64]:
        """How far each adapter moves the base: float64 [n_row, n_layer].

        measure  "cosine" and "euclidean" distances of states, else KL in nats through the lens
        pool     "last": the last token; or one of PLACES: what `places` gives for a span
        """
        self.timings = ProbeTimings()
        if pool in PLACES:
            places = yield from self.places(tokens, rows, span)
            states = places[PLACES.index(pool)]
        else:
            states = yield from self.states(tokens, rows)
        if measure == "cosine":
            return numbers.cosine_distance(states[0], states[1:])
        if measure == "euclidean":
            return numbers.euclidean_distance(states[0], states[1:])
        if self.timings.forward_ms:
            yield None
        context = self._room_for(tokens, all_outputs=pool != "last")
        before = context.lens_ms
        divergence = context.divergence(states[0], states[1:], lens)
        lens_ms, divergence_ms = np.subtract(context.lens_ms, before)
        self.timings = ProbeTimings(self.timings.forward_ms, float(lens_ms), float(divergence_ms))
        return divergence

    def timed(self, steps: Steps[T]) -> Steps[T]:
        """Do what the base alone is asked, and note its time."""
        start = time.perf_counter()
        result = yield from steps
        self.timings = ProbeTimings(forward_ms=1e3 * (time.perf_counter() - start))
        return result

    def _check_finite(self, states: F32, rows: Sequence[int]) -> None:
        if np.isfinite(states).all():
            return
        *_, seq, layer, _ = (int(index[0]) for index in np.nonzero(~np.isfinite(states)))
        path = self._pack.paths[rows[seq - 1]] if seq else self._model.path
        raise BackendError(
            f"The state after block {layer} is NaN or infinite with {path}, expected finite "
            "numbers; convert or fetch it again, or leave it out."
        )

    def _use(self, context: ProbeContext, rows: tuple[int, ...]) -> None:
        """Let a sequence be each of these adapters; what was read with others is forgotten."""
        if rows != self._rows:
            self._forget(context)
            self._set_weights(context, rows)
            self._rows = rows

    def _go_on(self, context: ProbeContext, tokens: Sequence[int], n_after: int = 0) -> int:
        """Hold what was read of a query's beginning; gives how many tokens."""
        pieces = context.pieces(1 + len(self._rows))
        return self.prefixes.go_on(
            context, self._rows, tokens, pieces, n_exact=self._n_exact, n_after=n_after
        )

    def _forget(self, context: ProbeContext) -> None:
        """Hold nothing, but keep what is of use to other queries."""
        self.prefixes.keep(self._rows, context, self._n_exact)
        context.clear()

    def _set_weights(self, context: ProbeContext, rows: tuple[int, ...]) -> None:
        for i, row in enumerate(self._in_order(rows)):
            alone = np.zeros((self._pack.n_adapter, self._model.n_layer), np.float32)
            alone[row] = 1.0
            context.set_weights(alone, seq=1 + i)

    def _room_for(self, tokens: Sequence[int], *, all_outputs: bool) -> ProbeContext:
        held = self._context
        if held is not None and held.n_ctx >= len(tokens) and held.all_outputs >= all_outputs:
            return held
        state, self._context = closed(held), None
        n_adapter = self._pack.n_adapter
        context = probe_context(
            self._model,
            self._pack,
            self._options,
            max(len(tokens), 0 if held is None else held.n_ctx),
            n_seq=1 + n_adapter,
            is_differential=n_adapter > 0,
            all_outputs=all_outputs,
        )
        self._set_weights(context, self._rows)
        if state is not None:
            context.load_kv_state(state)
        self._context = context
        return context


class QueryProbe:
    """What a strategy may measure of one query: strategy.Probe over a Prober.

    run  drives what measures it
    """

    def __init__(self, prober: Prober, query: Query, rows: Sequence[int], run: Run) -> None:
        self._prober, self._query, self._rows, self._run = prober, query, tuple(rows), run

    def _of_base(self, steps: Steps[T]) -> T:
        return self._run(self._prober.timed(steps))

    def divergence(self, measure: Measure = "kl") -> F64:
        query = self._query
        how = (measure, query.lens, query.pool, query.question)
        return self._run(self._prober.divergence(query.tokens, self._rows, *how))

    def states(self) -> F32:
        query = self._query
        if query.pool == "question":
            return np.array(self._places()[1])
        return np.array(self._run(self._prober.states(query.tokens, self._rows)))

    def _places(self) -> F32:
        query = self._query
        return self._run(self._prober.places(query.tokens, self._rows, query.question))

    def places(self, measure: PlaceMeasure) -> F64:
        if measure == "added":
            query, base = self._query, self._prober.base
            return self._of_base(base.added(query.tokens, self._rows, query.question))
        return np.stack([numbers.cosine_distance(each[0], each[1:]) for each in self._places()])

    def embedding(self) -> F32:
        return self._of_base(self._prober.base.embedding(self._query.tokens))

    def routing(self, reading: Reading) -> tuple[F64, F64]:
        return self._of_base(self._prober.base.routing(self._query.tokens, self._rows, reading))

    def norms(self) -> F64:
        return self._of_base(self._prober.base.norms(self._query.tokens, self._rows))
