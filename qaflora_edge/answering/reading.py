"""A reading: what is measured of one prompt, each thing once, when a strategy asks for it."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Self, TypeVar

import numpy as np

from qaflora_edge.arrays import F32, F64, ArrayLike
from qaflora_edge.backend.context import N_OUTPUT, KvState
from qaflora_edge.inference.sequence import (
    Cancellation,
    DraftState,
    Request,
    RunningSequence,
)
from qaflora_edge.progress import Tell, silent
from qaflora_edge.prompt.tokens import N_EARLIER, earlier_questions
from qaflora_edge.weighing.added import Heard
from qaflora_edge.weighing.numbers import n_base_of
from qaflora_edge.weighing.plan import ANSWER, BASE, Draft
from qaflora_edge.weighing.strategy import (
    AdapterMatrices,
    Closeness,
    Measure,
    Query,
    Reading,
    Span,
)

if TYPE_CHECKING:
    from qaflora_edge.backend.branches import Steps
    from qaflora_edge.inference.core import Core
    from qaflora_edge.inference.drafts import DraftSoFar
    from qaflora_edge.weighing.added import Listener

T = TypeVar("T")
N_RECOGNISED = 48  # last tokens of a question that are scored under adapters


class PromptReading(Reading):
    """Read one prompt for a strategy: see weighing.strategy.Reading.

    The base's pass over it keeps its slot, for who writes there: until take(), or the block's end.

    tell      called with "weighing", how many tokens are done, and how many there are
    n_answer  tokens of the answer that the slot gets room for; None: no limit
    on_draft  called with the text so far of what is answered unless drafts decide otherwise
    """

    def __init__(
        self,
        core: "Core",
        query: Query,
        cancellation: Cancellation,
        *,
        tell: Tell = silent,
        n_answer: int | None = 0,
        on_draft: Callable[[str], Any] = silent,
    ) -> None:
        self.query = query
        self._core = core
        self._cancellation = cancellation
        self._tell = tell
        self._n_answer = n_answer
        self._on_draft = on_draft
        self._rows = core.rows(query.adapters)
        self._tokens = query.tokens[: query.n_weighed]
        self._sequence: RunningSequence | None = None  # that the base reads the prompt in
        self._listener: Listener | None = None  # that heard it
        self._added: tuple[F64, Listener] | None = None  # what it heard
        n_base = n_base_of(len(query.tokens))
        self._by_base = Request(query.tokens, core.weights_of(BASE), n_base=n_base)
        self._drafts: dict[str, DraftState] = {}
        self._spans: list[Span] = []  # of earlier questions, once they are found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """Free the slot that is kept."""
        if self._sequence is not None:
            self._core.loop.end(self._sequence)
            self._sequence = None

    def take(self) -> RunningSequence | None:
        """Hand over the sequence in which the base has read the prompt, if there is one."""
        sequence = self._sequence
        self._sequence = None
        return sequence

    def divergence(self, measure: Measure = "kl") -> F64:
        query = self.query
        measured = partial(self._core.prober.divergence, self._tokens, self._rows, measure)
        return self._run(measured(query.lens, query.pool, query.question))

    def states(self) -> F32:
        query = self.query
        steps = self._core.prober.states(self._tokens, self._rows, query.pool, query.question)
        return np.array(self._run(steps))

    def added(self) -> F64:
        return np.array(self._heard()[0])

    def surprise(self) -> float:
        return self._heard()[1].nats

    def goes_on(self) -> float:
        if not self._earlier():  # they are empty texts
            return 0.0
        first, _ = self._earlier()[-1]
        return self._surprise(self.query.question, first) - self.surprise()

    def earlier(self) -> tuple[float, F64]:
        nats = []
        in_questions = []
        for span in self._earlier()[:N_EARLIER]:
            heard = self._core.added.remembered(self._rows, span, self._tokens)
            in_question, surprise = heard or self._hear_earlier(span)
            in_questions.append(in_question)
            nats.append(surprise)
        return max(nats, default=0.0), np.array(in_questions)

    def _hear_earlier(self, span: Span) -> tuple[F64, float]:
        """Tell what adapters would add in an earlier question: [n_adapter, n_layer]; its nats."""
        start, end = span
        asked = replace(self.query, tokens=self._tokens[:end], question=span, n_weighed=end)
        steps = self._core.added.together([asked], self._rows, self._kv_state())
        heard = self._core.run(steps, self._cancellation, contexts="branch")[:, 0]
        nats = self._surprise(span, start)
        self._core.added.remember(self._rows, span, asked.tokens, Heard(heard, nats))
        return heard[1], nats

    def _surprise(self, span: Span, n_before: int) -> float:
        """Tell how much a question surprises the base behind the prompt's first n_before tokens."""
        start, end = span
        question = self._tokens[start:end][: 1 + N_OUTPUT]
        (logprobs,) = self._behind(n_before, [question], [BASE])
        return -sum(logprobs)

    def _earlier(self) -> list[Span]:
        """Find the user turns before the last one, the latest first."""
        if not self._spans:
            self._spans = earlier_questions(self._core.model, self._tokens)
        return self._spans

    def close(self) -> dict[str, Closeness]:
        examples = self._core.examples()
        return {} if examples is None else examples.close(self.base_states(), self.query.adapters)

    def base_states(self) -> F32:
        """Give what examples are compared by, as weighing.added.Heard has it: [2, n_embd]."""
        states = self._heard()[1].states
        assert states is not None
        return states

    def next_logits(self) -> F32:
        next_logits = self._heard()[1].next_logits
        assert next_logits is not None
        return next_logits

    def _heard(self) -> "tuple[F64, Listener]":
        """Let the base read the prompt, once, and give what was heard of each adapter.

        No cached_property: before Python 3.12 it has one lock for all objects of a class, so that
        every prompt would wait for the one that is read.
        """
        if self._added is None:
            self._added = self._hear()
        return self._added

    def _hear(self) -> "tuple[F64, Listener]":
        query = self.query
        n_scored = N_OUTPUT * query.is_chat
        end = len(self._tokens)
        listener = self._core.added.listener(
            self._rows, query.question, end, n_scored, query.tokens
        )
        return self._listen(listener), listener

    def neutral(self) -> F64:
        steps = self._core.added.neutral(self.query, self._rows, self._kv_state)
        return np.array(self._core.run(steps, self._cancellation, contexts="branch"))

    def question(self) -> str:
        start, end = self.query.question
        data = self._core.model.detokenize(self.query.tokens[start:end])
        return data.decode("utf-8", "replace")

    def listen(self, read: type[AdapterMatrices]) -> Any:
        matrices = self._core.prober.matrices(tuple(self._rows), read)
        return self._listen(matrices.listener(len(self._tokens)))

    def drafts(
        self, names: Iterable[str], n_token: int, answer: ArrayLike | None = None
    ) -> "list[Draft]":
        from qaflora_edge.inference.drafts import N_TOGETHER, DraftSoFar

        names = list(names)
        core = self._core
        wanted = {name: core.weights_of(name) for name in names if name != ANSWER}
        answering = ""  # whose draft the answer begins with, if these stay the weights
        if answer is not None:
            weights = core.all_weights(self.query.adapters, answer)
            answering = self._name_of(weights, wanted)
            wanted[answering] = weights
        missing = {
            name: weights
            for name, weights in wanted.items()
            if name not in self._drafts or not self._drafts[name].draft.has(n_token)
        }
        left = sorted(missing, key=lambda name: name != answering)
        for at in range(0, len(left), N_TOGETHER):
            together = {name: missing[name] for name in left[at : at + N_TOGETHER]}
            first = DraftSoFar()
            steps = core.drafter.draft(
                self._by_base,
                together,
                self._drafts,
                n_token,
                self._kv_state,
                self._logits_heard,
                first,
            )
            tell = partial(self._show, first) if left[at] == answering else silent
            for state in core.run(steps, self._cancellation, tell, contexts="branch"):
                self._drafts[state.draft.adapter] = state
        return [self._drafts[answering if name == ANSWER else name].draft for name in names]

    def base_logprobs(self, drafts: Sequence[Draft]) -> list[tuple[float, ...]]:
        n_read = len(self.query.tokens) - 1
        last = self.query.tokens[n_read:]
        read_on = [last + draft.tokens for draft in drafts]
        return self._behind(n_read, read_on, [BASE] * len(drafts))

    def expected(self, names: Sequence[str], goes_on: bool) -> list[tuple[float, ...]]:
        start, end = self.query.question
        if goes_on:
            start, _ = self._earlier()[-1]
        start = max(start, end - N_RECOGNISED)
        question = self._tokens[start:end]
        return self._behind(start, [question] * len(names), names)

    def _behind(
        self, n_read: int, continuations: Sequence[tuple[int, ...]], names: Sequence[str]
    ) -> list[tuple[float, ...]]:
        """Give log p, in nats, of tokens from the second on, each under an adapter or BASE.

        n_read  the prompt's first tokens, which the base reads before
        """
        core = self._core
        request = replace(self._by_base, tokens=self.query.tokens[:n_read])
        weights = [core.weights_of(name) for name in names]
        steps = core.scorer.behind(request, continuations, weights, self._kv_state)
        scores = core.run(steps, self._cancellation, contexts="branch")
        return [tuple(logprobs.tolist()) for logprobs in scores]

    def draft_state(self, weights: F32) -> DraftState | None:
        """Give the draft under these weights, with which an answer begins, if there is one.

        weights  [n_adapter, n_layer] of all loaded adapters
        """
        for state in self._drafts.values():
            if state.kv_state is not None and (state.weights == weights).all():
                return state
        return None

    def _name_of(self, weights: F32, wanted: dict[str, F32]) -> str:
        """Name who drafts under the answer's weights; ANSWER has the draft of one mix alone."""
        drafted = {name: state.weights for name, state in self._drafts.items()}
        for name, other in (wanted | drafted).items():
            if (weights == other).all():
                return name
        self._drafts.pop(ANSWER, None)
        return ANSWER if weights.any() else BASE

    @property
    def _logits_heard(self) -> F32 | None:
        return None if self._listener is None else self._listener.next_logits

    def _show(self, first: "DraftSoFar", n_token: int) -> None:
        self._on_draft(self._core.model.text(first.tokens[:n_token]))

    def _kv_state(self) -> KvState | None:
        if self._sequence is None or self._sequence.slot is None:
            return None
        return self._core.context.kv_state_of(self._sequence.slot)

    def _run(self, steps: "Steps[T]") -> T:
        n_token = len(self.query.tokens)
        return self._core.run(
            steps, self._cancellation, lambda n_done: self._tell("weighing", n_done, n_token)
        )

    def _listen(self, listener: "Listener") -> Any:
        """Let the base read the prompt in a slot of answers, where a listener hears it."""
        self.end()
        self._listener = listener
        core = self._core
        n_ctx = core.n_ctx_for(len(self.query.tokens), self._n_answer)
        request = Request(
            self.query.tokens,
            np.zeros((len(core.adapters), core.model.n_layer), np.float32),
            n_base=self._by_base.n_base,
            cancellation=self._cancellation,
        )
        sequence = RunningSequence(request, None, 0, n_ctx, listener)
        core.loop.add(sequence)
        try:
            core.loop.follow(sequence, partial(self._tell, "weighing"))
        except BaseException:
            self._cancellation.set()
            core.loop.drive(lambda: sequence.is_done)
            raise
        if sequence.error is not None:
            raise sequence.error
        self._sequence = sequence
        return listener.result()
