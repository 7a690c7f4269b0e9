"""The probe: measure one query with the base and with each adapter alone.

Work is cut at micro-batches: a generator yields between them, for its driver's other requests.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from pathlib import Path
from threading import Lock
from typing import Any, Protocol, TypeVar

import numpy as np

from qaflora_edge.arrays import F32, F64
from qaflora_edge.backend.batch import Span as Tokens
from qaflora_edge.backend.batch import n_common
from qaflora_edge.backend.context import Context, KvState, default_threads, n_ctx_for
from qaflora_edge.backend.model import Model, Pack
from qaflora_edge.backend.prefix import GrowingContext, Prefixes, Steps, prefill, wiped_on_failure
from qaflora_edge.errors import BackendError
from qaflora_edge.formats.adapter import AdapterInfo, read_adapter_gguf
from qaflora_edge.progress import silent
from qaflora_edge.weighing import numbers
from qaflora_edge.weighing.adapter_inputs import (
    AttentionInputs,
    AttentionSizes,
    QueryProjections,
    sums_of,
)
from qaflora_edge.weighing.strategy import Measure, Query, Routing, Span

T = TypeVar("T")
Ids = Sequence[int]  # of tokens
Rows = Sequence[int]  # numbers of adapters
RowKey = tuple[int, ...]  # the same
PLACES = ("answer", "question")  # the last token, where the answer begins; the question's mean
_N_BLOCK = 64  # tokens of a question that are summed together
_N_NEUTRAL = 64  # system prompts that are remembered
_N_HEARD = 64  # questions that are, for prompts that go on behind them
_N_TOGETHER = 8  # short queries of one batch: the base's matrices are read once for all


@dataclass(frozen=True)
class _Measured:
    """What was measured: a prompt with these adapters.

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


class Listener(Protocol):
    """Take what the base's query projections read of a prompt, chunk by chunk.

    start   the first token that is needed; KV state of those before it may be reused
    scored  positions whose next token the base is asked about, from start on
    nats    how much these tokens surprised it, together: -log of their probabilities
    hears_next   whether it takes what the base expects after the prompt
    next_logits  that: float32 [n_vocab]
    result  the measure, once all tokens are taken
    """

    start: int
    scored: range = range(0)
    nats: float = 0.0
    hears_next: bool = False
    next_logits: F32 | None = None

    def take(self, at: int, inputs: F32) -> None:
        """Take inputs [n_token, n_layer, n_embd] of the tokens from position `at` on."""

    def result(self) -> Any: ...


class _Norms(Listener):
    def __init__(self, projections: QueryProjections, n_token: int) -> None:
        self._projections = projections
        self.start = n_token - 1

    def take(self, at: int, inputs: F32) -> None:
        if at <= self.start:  # a thought may follow it
            self._last = inputs[self.start - at]

    def result(self) -> F64:
        return self._projections.norms(self._last)


class _Routing(Listener):
    start = 0

    def __init__(self, attention: AttentionInputs) -> None:
        self._attention = attention
        self._sums = np.zeros(())
        self._n_token = 0

    def take(self, at: int, inputs: F32) -> None:
        self._sums = self._sums + self._attention.sums(inputs)
        self._n_token += len(inputs)

    def result(self) -> tuple[F64, F64]:
        weights, sizes = self._sums / self._n_token
        return weights, sizes


class _Added(Listener):
    """Sum in the question, and at the last token: [2, n_row, n_layer].

    Of a layer's modules the geometric mean is taken, 0 where an adapter adapts none of them.
    The question is summed in blocks, so that sums do not depend on how a prompt is cut.
    """

    def __init__(
        self,
        sizes: Sequence[AttentionSizes],
        question: Span,
        end: int,
        threads: Executor,
        remember: Callable[[F64, float], object],
    ) -> None:
        self._sizes = sizes
        self._remember = remember
        self.start, self._stop = question
        self._end = end
        self._threads = threads
        self._question: list[F64] = [np.zeros(1)] * len(sizes)  # sums over its tokens
        self._waiting: list[F32] = []  # of a block that is not full: [n_token, n_layer, n_embd]
        self._n_waiting = 0

    def take(self, at: int, inputs: F32) -> None:
        begin = max(self.start - at, 0)
        stop = min(max(self._stop - at, 0), len(inputs))
        while begin < stop:
            end = min(stop, begin + _N_BLOCK - self._n_waiting)
            self._waiting.append(inputs[begin:end].copy())
            self._n_waiting += end - begin
            begin = end
            if self._n_waiting == _N_BLOCK:
                self._add()
        if at < self._end:
            until_end = inputs[: self._end - at]
            self._last = until_end[-1:]

    def _add(self) -> None:
        sums = sums_of(self._sizes, np.concatenate(self._waiting), self._threads)
        for row, more in enumerate(sums):
            self._question[row] = self._question[row] + more
        self._waiting = []
        self._n_waiting = 0

    def result(self) -> F64:
        if self._waiting:
            self._add()
        n_token = self._stop - self.start
        last = sums_of(self._sizes, self._last, self._threads)
        question = [sums / n_token for sums in self._question]
        by_place = []
        for place in (last, question):
            by_row = []
            for sizes, of_modules in zip(self._sizes, place, strict=True):
                by_row.append(sizes.of_layers(of_modules))
            by_place.append(by_row)
        result = np.array(by_place)
        self._remember(result, self.nats)
        return result


class _Remembered(Listener):
    """Give what was heard of a question before: of this prompt nothing has to be read for it."""

    def __init__(self, n_token: int, result: F64, nats: float) -> None:
        self.start = n_token - 1
        self.nats = nats
        self._result = result

    def take(self, at: int, inputs: F32) -> None:
        pass

    def result(self) -> F64:
        return self._result


class Prober:
    """Measure with sequences of one context: the base, then each adapter alone at weight 1.

    alike     options of contexts that take the KV state of an answer; by default `options`
    infos, sizes  the adapters' facts, where they were read before
    prefixes  the prefix cache; by default only the last query's KV state is reused

    Two measures of one query in turn cost one pass. Listeners and embedding() measure with the base
    alone: one pass, however many adapters there are.

    rows, in all methods: which adapters of the pack are measured, in ascending order.
    """

    def __init__(
        self,
        model: Model,
        pack: Pack,
        options: dict[str, Any],
        *,
        alike: dict[str, Any] | None = None,
        infos: Sequence[AdapterInfo] | None = None,
        sizes: Sequence[AttentionSizes] = (),
        prefixes: Prefixes | None = None,
    ) -> None:
        self.prefixes = prefixes or Prefixes(0)
        self._model = model
        self._pack = pack
        self._options = options
        self._infos = infos or [read_adapter_gguf(path) for path in pack.paths]
        # Adapters' matrices as measures take them, read when first asked for.
        self._queries = lru_cache(1)(self._read_queries)
        self._attention = lru_cache(2)(self._read_attention)
        self._sizes: Callable[[int], AttentionSizes] = sizes.__getitem__
        if not sizes:
            self._sizes = cache(self._read_sizes)
        self._make_base = partial(Context, model, pack, is_probe=True, **options)
        self._make_alike = partial(Context, model, pack, is_probe=True, **(alike or options))
        self._base = GrowingContext(partial(self._make_base, n_seq=1))
        self._contexts = GrowingContext(self._make_context)
        self._threads = ThreadPoolExecutor(options.get("threads") or default_threads())
        self._rows: RowKey = ()  # adapters of the sequences after the base's
        self._n_exact: int | None = None  # tokens held in the cuts of a whole prompt; None: all
        self._last: tuple[_Measured, F32] | None = None
        self._neutral: dict[tuple[Any, ...], F64] = {}  # the oldest first
        self._heard: dict[tuple[Any, ...], tuple[F64, float]] = {}  # likewise, of added()
        self._remembering = Lock()

    def _read_queries(self, rows: RowKey) -> QueryProjections:
        infos = [self._infos[row] for row in rows]
        return QueryProjections(infos, self._model.n_layer)

    def _read_attention(self, rows: RowKey, routing: Routing) -> AttentionInputs:
        infos = [self._infos[row] for row in rows]
        return AttentionInputs(infos, self._model.n_layer, routing)

    def _read_sizes(self, row: int) -> AttentionSizes:
        return AttentionSizes(self._infos[row], self._model.n_layer)

    def close(self) -> None:
        """Free all contexts, and threads."""
        self._threads.shutdown(wait=False)
        self._base.close()
        self._contexts.close()
        self._last = None

    def norms(self, rows: Rows, n_token: int) -> Listener:
        """Measure what each adapter adds to a late query projection: float64 [n_row].

        Raises as strategy.Reading.norms does.
        """
        return _Norms(self._queries(tuple(rows)), n_token)

    def routing(self, rows: Rows, routing: Routing) -> Listener:
        """Compute what strategy.Reading.routing gives, and raise as it does."""
        return _Routing(self._attention(tuple(rows), routing))

    def added(
        self, rows: Rows, span: Span, end: int, n_scored: int = 0, tokens: Ids = ()
    ) -> Listener:
        """Measure what each adapter would add to q, k and v in two places: [2, n_row, n_layer].

        span  where the question's tokens stand
        end   tokens of the prompt that are weighed
        n_scored  most tokens of the question, after its first, that the base is asked about
        tokens  of the prompt: one that only goes on after `end` is not measured again
        """
        key = (tuple(rows), span, n_scored, tuple(tokens[:end]))
        if end < len(tokens) and key in self._heard:
            return _Remembered(len(tokens), *self._heard[key])
        sizes = [self._sizes(row) for row in rows]
        remember = partial(self._remember, key) if tokens else silent
        listener = _Added(sizes, span, end, self._threads, remember)
        start, stop = span
        last_scored = min(start + n_scored, stop - 1)
        listener.scored = range(start, last_scored)
        listener.hears_next = n_scored > 0
        return listener

    def _remember(self, key: tuple[Any, ...], result: F64, nats: float) -> None:
        with self._remembering:  # callers have threads of their own
            self._heard[key] = result, nats
            while len(self._heard) > _N_HEARD:
                del self._heard[next(iter(self._heard))]

    def mean_states(self, tokens: Ids, n_skipped: int = 0) -> Steps[F32]:
        """Average the states after each block over tokens: float32 [n_layer, n_embd].

        n_skipped  first tokens that do not count
        """
        context = self._base.for_query(len(tokens))
        context.clear()
        with wiped_on_failure(context):
            if n_skipped:
                context.decode(tokens[:n_skipped], start=0, outputs="none", n_seq=1)
            context.capture_begin("mean")
            yield from prefill(context, tokens, n_skipped, "all")
            states = context.states(0)
        _check_finite(states[None], [self._model.path])
        return np.array(states)

    def added_together(
        self, queries: Sequence[Query], rows: Rows, state: KvState | None = None
    ) -> Steps[F64]:
        """Measure the same of many short queries: [2, n_query, n_row, n_layer].

        state  the base's KV state of a prompt that begins as they do, where it is known

        What all have before their questions is prefilled once. Yields how many are measured.
        """
        first = queries[0].tokens
        n_same = len(first)  # tokens that all have before their questions
        for query in queries:
            start, _ = query.question
            n_same = min(n_same, n_common(first, query.tokens), start)
        starts = range(0, len(queries), _N_TOGETHER)
        groups = [queries[at : at + _N_TOGETHER] for at in starts]
        n_most = 0  # tokens that a group has of its own
        for group in groups:
            n_most = max(n_most, sum(len(query.tokens) - n_same for query in group))
        n_held = 0 if state is None else len(state.tokens)
        n_ctx = n_ctx_for(max(n_same + n_most, n_held))
        results: list[F64] = []
        with self._make_alike(n_ctx=n_ctx, n_seq=1 + _N_TOGETHER, is_unified=True) as context:
            if state is not None:
                with suppress(BackendError):  # another shape: it is prefilled
                    context.load_kv_state(state)
            n_held = context.keep(n_common(first[:n_same], context.tokens[0]), 0)
            if n_held < n_same:
                for _ in prefill(context, first[:n_same], n_held, "none"):
                    yield 0
            for group in groups:
                spans = []
                for seq, query in enumerate(group, 1):
                    spans.append(Tokens(seq, query.tokens[n_same:], n_same, "none"))
                for seq in range(1, context.n_seq):
                    context.copy(0, seq)
                context.capture_begin("inputs")
                context.decode_spans(spans)
                for seq, query in enumerate(group, 1):
                    end = len(query.tokens[: query.n_weighed])
                    listener = self.added(rows, query.question, end)
                    n_own = len(query.tokens) - n_same
                    inputs = context.inputs(seq, n_own)  # [n_own, n_layer, n_embd]
                    listener.take(n_same, inputs)
                    results.append(listener.result())
                yield len(results)
        return np.stack(results, axis=1)

    def neutral(self, query: Query, rows: Rows, read: Callable[[], KvState | None]) -> Steps[F64]:
        """Measure what strategy.Reading.neutral gives: once behind each of the last system prompts.

        read  gives the base's KV state of the query, where it is known
        """
        n_token = len(query.tokens)
        measured = []
        for prompts in zip(*query.neutral, strict=True):  # all as usual, then all behind it
            key = (tuple(rows), query.n_thought, prompts[0].tokens)
            if key not in self._neutral:
                queries = []
                for prompt in prompts:
                    assert prompt.question is not None
                    asked = replace(query, tokens=prompt.tokens, question=prompt.question)
                    n_weighed = len(prompt.tokens) - query.n_thought
                    queries.append(replace(asked, n_weighed=n_weighed))
                n_same = n_common(query.tokens, prompts[0].tokens)
                state = read() if 2 * n_same > n_token else None  # of long chats it is large
                self._neutral[key] = yield from self.added_together(queries, rows, state)
            measured.append(self._neutral[key])
        while len(self._neutral) > _N_NEUTRAL:
            del self._neutral[next(iter(self._neutral))]
        return np.stack(measured)

    def states(
        self, tokens: Ids, rows: Rows, pool: str = "last", span: Span | None = None
    ) -> Steps[F32]:
        """Give states: float32 [1 + n_row, n_layer, n_embd], the base first.

        pool  "last": the last token's; or one of PLACES, both in one pass, of the question at span
        """
        if pool not in PLACES:
            span = None
        asked = _Measured(tuple(tokens), tuple(rows), span)
        states = yield from self._measured(asked)
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

    def _measured(self, asked: _Measured) -> Steps[F32]:
        if self._last is not None and self._last[0] == asked:
            return self._last[1]
        context = self._contexts.for_query(len(asked.tokens))
        with wiped_on_failure(context):
            if asked.rows != self._rows:
                self.prefixes.keep(self._rows, context, self._n_exact)
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
        chunks = context.chunks(1 + len(self._rows))
        return self.prefixes.go_on(
            context, self._rows, tokens, chunks, n_exact=self._n_exact, n_after=n_after
        )

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
