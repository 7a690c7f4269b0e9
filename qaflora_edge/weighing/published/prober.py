"""The prober: measure one query with the base and with each adapter alone.

Work is cut at micro-batches: a generator yields between them, for its driver's other requests.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from qaflora_edge.arrays import F32, F64
from qaflora_edge.backend.branches import GrowingContext, Ids, Steps, prefill, wiped_on_failure
from qaflora_edge.backend.context import Context, n_ctx_for
from qaflora_edge.backend.model import Model, Pack
from qaflora_edge.errors import BackendError
from qaflora_edge.formats.adapter import AdapterInfo, read_adapter_gguf
from qaflora_edge.weighing import numbers
from qaflora_edge.weighing.strategy import AdapterMatrices, Measure, Span

Rows = Sequence[int]  # numbers of adapters
RowKey = tuple[int, ...]  # the same
PLACES = ("answer", "question")  # the last token, where the answer begins; the question's mean


@dataclass(frozen=True)
class _StatesKey:
    """Name states: of a prompt with these adapters.

    question  where it stands; None: only the last token's states are captured
    """

    tokens: tuple[int, ...]
    rows: RowKey
    question: Span | None


def _check_finite(states: F32, paths: Sequence[Path]) -> None:
    """Raise BackendError for a state that is no number, naming the file of its sequence.

    states  [..., n_seq, n_layer, n_embd]
    paths   of each sequence: the base's, or its adapter's
    """
    is_wrong = ~np.isfinite(states)
    if not is_wrong.any():
        return
    first = np.argwhere(is_wrong)[0]
    seq, layer = first[-3:-1].tolist()
    raise BackendError(
        f"The state after block {layer} is NaN or infinite with {paths[seq]}, expected finite "
        "numbers; convert or fetch it again, or leave it out."
    )


class Prober:
    """Measure with sequences of one context: the base, then each adapter alone at weight 1.

    infos  the adapters' facts, where they were read before

    The last query's KV state is reused. Two measures of one query in turn cost one pass.
    embedding() measures with the base alone: one pass, however many adapters there are.

    rows, in all methods: which adapters of the pack are measured, in ascending order.
    """

    def __init__(
        self,
        model: Model,
        pack: Pack,
        options: dict[str, Any],
        *,
        infos: Sequence[AdapterInfo] | None = None,
    ) -> None:
        self._model = model
        self._pack = pack
        self._options = options
        self._infos = infos or [read_adapter_gguf(path) for path in pack.paths]
        # (rows, read) -> what a measure takes of the adapters, read when first asked for
        self.matrices = lru_cache(2)(self._read_matrices)
        self._contexts = GrowingContext(self._make_context)
        self._rows: RowKey = ()  # adapters of the sequences after the base's
        self._n_exact: int | None = None  # tokens held in the cuts of a whole prompt; None: all
        self._last: tuple[_StatesKey, F32] | None = None

    def _read_matrices(self, rows: RowKey, read: type[AdapterMatrices]) -> AdapterMatrices:
        infos = [self._infos[row] for row in rows]
        return read(infos, self._model.n_layer)

    def close(self) -> None:
        """Free the context."""
        self._contexts.close()
        self._last = None

    def embedding(self, tokens: Ids) -> Steps[F32]:
        """Embed a text by the base alone, in one pass: float32 [n_embd], of length 1.

        Texts of one meaning are closest in the middle of a base: its states after three of five
        blocks are averaged, but for the first token's, which bases use for something else.
        """
        n_skipped = min(1, len(tokens) - 1)
        n_ctx = n_ctx_for(len(tokens))
        options: Any = self._options
        with Context(self._model, self._pack, n_ctx=n_ctx, is_probe=True, **options) as context:
            if n_skipped:
                context.decode(tokens[:n_skipped], start=0, outputs="none", n_seq=1)
            context.capture_begin("mean")
            yield from prefill(context, tokens, n_skipped, "all")
            states = context.states(0)  # [n_layer, n_embd]
        _check_finite(states[None], [self._model.path])
        state = np.array(states[3 * self._model.n_layer // 5], np.float32)
        return np.asarray(state / np.linalg.norm(state))

    def states(
        self, tokens: Ids, rows: Rows, pool: str = "last", span: Span | None = None
    ) -> Steps[F32]:
        """Give states: float32 [1 + n_row, n_layer, n_embd], the base first.

        pool  "last": the last token's; or one of PLACES, both in one pass, of the question at span
        """
        if pool not in PLACES:
            span = None
        asked = _StatesKey(tuple(tokens), tuple(rows), span)
        states = yield from self._read(asked)
        if span is None:
            return states
        return np.array(states[PLACES.index(pool)])

    def divergence(
        self, tokens: Ids, rows: Rows, measure: Measure, lens: str, pool: str, span: Span = (0, 0)
    ) -> Steps[F64]:
        """Measure how far each adapter moves the base: float64 [n_row, n_layer].

        measure  "cosine" and "euclidean" distances of states, else KL in nats through the lens
        pool     as states() takes it
        """
        states = yield from self.states(tokens, rows, pool, span)
        if measure == "cosine":
            return numbers.cosine_distance(states[0], states[1:])
        if measure == "euclidean":
            return numbers.euclidean_distance(states[0], states[1:])
        yield None
        return self._contexts.for_query(1).divergence(states[0], states[1:], lens)

    def _read(self, asked: _StatesKey) -> Steps[F32]:
        if self._last is not None and self._last[0] == asked:
            return self._last[1]
        context = self._contexts.for_query(len(asked.tokens))
        with wiped_on_failure(context):
            if asked.rows != self._rows:
                context.clear()
                self._rows = ()  # right at any interruption: the base has no weights
                self._set_weights(context, asked.rows)
                self._rows = asked.rows
            if asked.question is None:
                states = yield from self._last_states(context, asked.tokens)
            else:
                states = yield from self._place_states(context, asked.tokens, asked.question)
            adapter_paths = [self._pack.paths[row] for row in asked.rows]
            _check_finite(states, [self._model.path, *adapter_paths])
        self._last = (asked, states)
        return states

    def _last_states(self, context: Context, tokens: Ids) -> Steps[F32]:
        context.capture_begin()
        n_kept = self._reuse(context, tokens)
        self._n_exact = None
        n_seq = 1 + len(self._rows)
        yield from prefill(context, tokens, n_kept, "last", n_seq=n_seq)
        return self._states(context)

    def _place_states(self, context: Context, tokens: Ids, span: Span) -> Steps[F32]:
        """Prefill the tokens before the question, the question, and the rest, each for itself.

        Where nothing follows the question, its last token is the rest, and counts for the mean too.
        """
        start, end = span
        n_mean = end - start
        n_seq = 1 + len(self._rows)
        before = tokens[:start]
        n_kept = self._reuse(context, before, n_after=len(tokens) - start)
        self._n_exact = start  # the rest is cut otherwise than a whole prompt
        if start > n_kept:
            yield from prefill(context, before, n_kept, "none", n_seq=n_seq)
        if end == len(tokens):
            end -= 1
        context.capture_begin("mean")
        if start < end:
            yield from prefill(context, tokens[:end], start, "all", n_seq=n_seq)
            question = self._states(context)
        context.capture_begin("last")
        yield from prefill(context, tokens, end, "last", n_seq=n_seq)
        last = self._states(context)
        if start == end:
            question = last
        elif n_mean > end - start:  # the mean so far, and one state more
            question = question + (last - question) / np.float32(n_mean)
        return np.stack([last, question])

    def _reuse(self, context: Context, tokens: Ids, n_after: int = 0) -> int:
        """Keep what the last query begins alike: as many tokens as come out the same bits."""
        chunks = context.chunks(1 + len(self._rows))
        held = context.tokens[0][: self._n_exact]
        n_shared = chunks.n_shared(held, tokens, n_after)
        return context.keep_first(n_shared)

    def _states(self, context: Context) -> F32:
        order = self._in_order(self._rows)
        states = [context.states(0)]
        for row in self._rows:
            seq = 1 + order.index(row)
            states.append(context.states(seq))
        return np.stack(states)

    def _in_order(self, rows: RowKey) -> list[int]:
        """Order the adapters after the base: those that begin in a higher layer come later.

        Below its first layer an adapter equals the base, and the library leaves it out there.
        """
        return sorted(rows, key=lambda row: (self._pack.first_layers[row], row))

    def _set_weights(self, context: Context, rows: RowKey) -> None:
        shape = (self._pack.n_adapter, self._model.n_layer)
        order = self._in_order(rows)
        for seq, row in enumerate(order, 1):
            alone = np.zeros(shape, np.float32)
            alone[row] = 1.0
            context.set_weights(alone, seq=seq)

    def _make_context(self, n_ctx: int) -> Context:
        n_adapter = self._pack.n_adapter
        context = Context(
            self._model,
            self._pack,
            n_seq=1 + n_adapter,
            n_ctx=n_ctx,
            is_probe=True,
            is_differential=n_adapter > 0,
            **self._options,
        )
        self._set_weights(context, self._rows)
        return context
