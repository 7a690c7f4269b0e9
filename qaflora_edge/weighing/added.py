"""What adapters would add to q, k and v: heard while the base reads a prompt, for `two-place`."""

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from threading import Lock
from typing import Any, Protocol

import numpy as np

from qaflora_edge.arrays import F32, F64
from qaflora_edge.backend.batch import Span as Tokens
from qaflora_edge.backend.batch import n_common
from qaflora_edge.backend.branches import Branches, Steps, prefill
from qaflora_edge.backend.context import KvState
from qaflora_edge.backend.library import default_threads
from qaflora_edge.formats.adapter import AdapterInfo
from qaflora_edge.progress import silent
from qaflora_edge.weighing.adapter_inputs import AttentionSizes, sums_of
from qaflora_edge.weighing.strategy import Query, Span

Rows = Sequence[int]  # numbers of adapters
_Asked = tuple[tuple[int, ...], Span, tuple[int, ...]]  # rows, question, tokens that were read
_N_BLOCK = 64  # tokens of a question that are summed together
_N_NEUTRAL = 64  # system prompts that are remembered
_N_HEARD = 64  # questions that are, for prompts that go on behind them
_LEAST_LENGTH = 1e-12  # of a state
_N_TOGETHER = 8  # short queries of one batch: the base's matrices are read once for all


@dataclass(frozen=True)
class Heard:
    """Hold what was heard of one prompt.

    added   [2, n_row, n_layer]: at the last token, in the question
    nats    by which the question surprised the base
    states  [2, n_embd], each of length 1: where the question ends, in a middle block, and of the
            last token, in the last; None where they were not kept
    """

    added: F64
    nats: float
    states: F32 | None = None


class Listener(Protocol):
    """Take what the base's query projections read of a prompt, chunk by chunk.

    start   the first token that is needed; KV state of those before it may be reused
    scored  positions whose next token the base is asked about, from start on
    nats    how much these tokens surprised it, together: -log of their probabilities
    hears_next   whether it takes what the base expects after the prompt
    next_logits  that: float32 [n_vocab]
    states  of the base, as Heard has them, once all tokens are taken
    result  the measure, once all tokens are taken
    """

    start: int
    scored: range = range(0)
    nats: float = 0.0
    hears_next: bool = False
    next_logits: F32 | None = None
    states: F32 | None = None

    def take(self, at: int, inputs: F32) -> None:
        """Take inputs [n_token, n_layer, n_embd] of the tokens from position `at` on."""

    def result(self) -> Any: ...


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
        remember: Callable[[Heard], object],
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
        last = self._stop - 1 - at  # token of the question
        if 0 <= last < len(inputs):
            n_layer = inputs.shape[1]
            self._question_end = inputs[last, 2 * n_layer // 3].copy()
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
        states = np.stack([self._question_end, self._last[0, -1]])  # [2, n_embd]
        lengths = np.linalg.norm(states, axis=1, keepdims=True)
        self.states = np.asarray(states / np.maximum(lengths, _LEAST_LENGTH), np.float32)
        self._remember(Heard(result, self.nats, self.states))
        return result


class _Remembered(Listener):
    """Give what was heard of a question before: of this prompt nothing has to be read for it."""

    def __init__(self, n_token: int, heard: Heard) -> None:
        self.start = n_token - 1
        self.nats = heard.nats
        self.states = heard.states
        self._result = heard.added

    def take(self, at: int, inputs: F32) -> None:
        pass

    def result(self) -> F64:
        return self._result


class Added:
    """Measure what adapters would add, in one pass of the base however many there are.

    infos    the adapters' facts
    sizes    of all adapters, where they were read before; else each is read when it is asked for
    n_layer  of the base
    threads  that sum

    rows, in all methods: which adapters are measured, in ascending order.
    """

    def __init__(
        self,
        branches: Branches,
        infos: Sequence[AdapterInfo],
        sizes: Sequence[AttentionSizes],
        n_layer: int,
        threads: int | None,
    ) -> None:
        self._branches = branches
        self._sizes: Callable[[int], AttentionSizes] = sizes.__getitem__
        if not sizes:
            self._sizes = cache(lambda row: AttentionSizes(infos[row], n_layer))
        self._nothing = np.zeros((len(infos), n_layer), np.float32)
        self._threads = ThreadPoolExecutor(threads or default_threads())
        self._neutral: dict[tuple[Any, ...], F64] = {}  # the oldest first
        self._heard: dict[_Asked, Heard] = {}  # likewise
        self._remembering = Lock()

    def close(self) -> None:
        """End its threads."""
        self._threads.shutdown(wait=False)

    def listener(
        self, rows: Rows, span: Span, end: int, n_scored: int = 0, tokens: Sequence[int] = ()
    ) -> Listener:
        """Measure what each adapter would add to q, k and v in two places: [2, n_row, n_layer].

        span  where the question's tokens stand
        end   tokens of the prompt that are weighed
        n_scored  most tokens of the question, after its first, that the base is asked about
        tokens  of the prompt: one that only goes on after `end` is not measured again
        """
        asked = (tuple(rows), span, tuple(tokens[:end]))
        heard = self._heard.get(asked)
        if n_scored and end < len(tokens) and heard is not None and heard.states is not None:
            return _Remembered(len(tokens), heard)
        sizes = [self._sizes(row) for row in rows]
        remember = partial(self.remember, *asked) if n_scored else silent
        listener = _Added(sizes, span, end, self._threads, remember)
        start, stop = span
        last_scored = min(start + n_scored, stop - 1)
        listener.scored = range(start, last_scored)
        listener.hears_next = n_scored > 0
        return listener

    def remembered(self, rows: Rows, span: Span, tokens: Sequence[int]) -> tuple[F64, float] | None:
        """Give what was heard of an earlier question of a prompt, if it is still known.

        returns  in the question, [n_row, n_layer]; the nats by which it surprised the base
        """
        with self._remembering:
            everything = list(self._heard.items())
        for (of_rows, at, before), heard in everything:
            if of_rows == tuple(rows) and at == span and before == tuple(tokens[: len(before)]):
                _, in_question = heard.added
                return in_question, heard.nats
        return None

    def remember(self, rows: Rows, span: Span, tokens: Sequence[int], heard: Heard) -> None:
        """Keep what was heard of a chat's question, for prompts that go on behind it.

        tokens  of the prompt, as far as it was heard
        """
        with self._remembering:  # callers have threads of their own
            self._heard[tuple(rows), span, tuple(tokens)] = heard
            while len(self._heard) > _N_HEARD:
                del self._heard[next(iter(self._heard))]

    def together(
        self, queries: Sequence[Query], rows: Rows, state: KvState | None = None
    ) -> Steps[F64]:
        """Measure the same of many short queries: [2, n_query, n_row, n_layer].

        state  the base's KV state of a prompt that begins as they do, where it is known
        """
        heard = yield from self._together(queries, rows, state)
        return np.stack([one.added for one in heard], axis=1)

    def states(self, queries: Sequence[Query]) -> Steps[list[F32]]:
        """Give the base's states of many short queries, as Heard has them."""
        heard = yield from self._together(queries, (), None)
        return [one.states for one in heard if one.states is not None]

    def _together(
        self, queries: Sequence[Query], rows: Rows, state: KvState | None
    ) -> Steps[list[Heard]]:
        """Let the base read short queries, several in a batch.

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
        heard: list[Heard] = []
        with self._branches.context(max(n_same + n_most, n_held), state) as context:
            context.set_weights(self._nothing)
            n_held = context.keep(n_common(first[:n_same], context.tokens[0]), 0)
            if n_held < n_same:
                for _ in prefill(context, first[:n_same], n_held, "none"):
                    yield 0
            for group in groups:
                spans = []
                for seq, query in enumerate(group, 1):
                    spans.append(Tokens(seq, query.tokens[n_same:], n_same, "none"))
                    context.copy(0, seq)
                    context.set_weights(self._nothing, seq=seq)
                context.capture_begin("inputs")
                context.decode_spans(spans)
                for seq, query in enumerate(group, 1):
                    end = len(query.tokens[: query.n_weighed])
                    listener = self.listener(rows, query.question, end)
                    n_own = len(query.tokens) - n_same
                    inputs = context.inputs(seq, n_own)  # [n_own, n_layer, n_embd]
                    listener.take(n_same, inputs)
                    added = listener.result()
                    heard.append(Heard(added, 0.0, listener.states))
                context.capture_begin("none")
                yield len(heard)
        return heard

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
                self._neutral[key] = yield from self.together(queries, rows, state)
            measured.append(self._neutral[key])
        while len(self._neutral) > _N_NEUTRAL:
            del self._neutral[next(iter(self._neutral))]
        return np.stack(measured)
