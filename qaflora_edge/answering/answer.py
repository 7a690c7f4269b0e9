"""An answer: the prompt is read, the strategy plans, and the plan is written.

A grammar takes from a small model what it reasons with: it may not write the words that come before
a number. So who answers under one drafts first, unbound, and writes with the draft in view.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from qaflora_edge.answering.generation import Generation, failed
from qaflora_edge.answering.reading import PromptReading
from qaflora_edge.arrays import F32
from qaflora_edge.ask import Ask, Chat, Prompt, Sampling, Weighing
from qaflora_edge.backend.batch import n_common
from qaflora_edge.backend.model import Model
from qaflora_edge.config import MAX_SEED
from qaflora_edge.errors import QafloraError
from qaflora_edge.inference.sampler import Sampler
from qaflora_edge.inference.sequence import Cancellation, Request, RunningSequence
from qaflora_edge.progress import silent
from qaflora_edge.weighing import numbers
from qaflora_edge.weighing.plan import (
    ANSWER,
    DRAFT_TOKENS,
    Draft,
    DraftStep,
    FusionWeights,
    Plan,
)
from qaflora_edge.weighing.strategy import Query, Reading
from qaflora_edge.weighing.weigher import Choice

if TYPE_CHECKING:
    from qaflora_edge.bundles.memory import AdapterSet
    from qaflora_edge.inference.core import Core
    from qaflora_edge.prompt.calls import Calls

N_OPENING = 8  # tokens that tell whether an answer has its form by itself
IN_WORDS = " Answer in words."  # behind the question to a knower
_N_AROUND = 8  # tokens around a draft, at most


def read(adapters: "AdapterSet", ask: Ask) -> Ask:
    """Turn what is asked into tokens, and all that binds its answer into one grammar."""
    sampling = ask.sampling
    if sampling.seed is None and adapters.seed is not None:
        sampling = replace(sampling, seed=adapters.seed)
    tools = ask.prompt.tools if isinstance(ask.prompt, Chat) else None
    calls: Calls | None = None
    if tools or ask.json_schema is not None or sampling.grammar is not None:
        from qaflora_edge.prompt.calls import bound, calls_of

        calls = calls_of(adapters.core.model.chat_template, tools)
        sampling = bound(sampling, ask.json_schema, calls)
    prompt = adapters.reader.read(ask.prompt, ask.parse_special)
    if calls is not None:
        prompt = replace(prompt, calls=calls)
    is_special = ask.parse_special and not isinstance(ask.prompt, Chat)
    return replace(
        ask, prompt=prompt, sampling=sampling, json_schema=None, parse_special=is_special
    )


def answer(adapters: "AdapterSet", ask: Ask) -> Generation:
    """Answer what is asked, once, as Engine.submit does."""
    with adapters.core.call():
        return _answer(adapters, read(adapters, ask))


def _answer(adapters: "AdapterSet", ask: Ask) -> Generation:
    """Answer what is asked with the prompt as the base reads it."""
    core = adapters.core
    with core.call():
        prompt = ask.prompt
        assert isinstance(prompt, Prompt)
        choice = adapters.weigher.choice(prompt, ask.weighing)
        sampler = Sampler(core.model, ask.sampling)  # a bad grammar is refused before the work
        cancellation = core.cancellation(ask.cancel)
        writing = Writing(core, ask, sampler, cancellation, choice.is_read_by_base)
        reading = PromptReading(
            core,
            choice.query,
            cancellation,
            tell=ask.on_progress,
            n_answer=_n_room(choice, sampler, ask.sampling.max_tokens),
            on_draft=ask.on_draft,
        )
        with reading:
            fusion = choice.weigh(reading)
            if sampler.constraint and _may_draft(fusion.plan, choice.query, ask.weighing.drafts):
                fusion = drafted_first(fusion, reading, writing.fits)
            sequence = writing.begin(fusion, reading)
        generation = Generation(core, fusion, sequence, writing)
        ask.on_weights(fusion)
        if ask.waits:
            generation.wait_for_prompt(ask.on_progress)
        return generation


def _may_draft(plan: Plan, query: Query, wanted: bool | None) -> bool:
    """Tell whether who answers drafts, if it would not write the form by itself.

    wanted  None: an adapter does, the base does not, which drafts at length and loses details

    Nobody drafts twice. A draft fits no plain text, no thought and no tool's result.
    """
    if wanted is None:
        wanted = bool(np.any(plan.weights))
    may = query.is_chat and query.can_draft and not query.has_results
    return wanted and may and plan.drafting is None


def drafted_first(
    fusion: FusionWeights, reading: Reading, fits: Callable[[str], bool]
) -> FusionWeights:
    """Let who answers draft before it writes, unless its own form fits.

    fits  tells whether an answer that begins with a text has the form that binds it
    """
    plan = fusion.plan
    weights = fusion.weights
    (own,) = reading.drafts([ANSWER], N_OPENING, weights)
    if fits(own.text):
        return fusion
    drafting = DraftStep(fusion.writer, mix=weights, begun=own)
    writing = replace(plan.writing, view="before", guesses=())
    plan = replace(plan, steps=(drafting, writing))
    return replace(fusion, plan=plan, drafts=plan.read_drafts)


def answers(adapters: "AdapterSet", ask: Ask) -> Iterator[Generation]:
    """Answer what is asked `ask.n` times, as Engine.submit_all does."""
    with adapters.core.call():
        ask = read(adapters, ask)
    first = ask.sampling.seed
    for i in range(ask.n):
        if first is not None:
            sampling = replace(ask.sampling, seed=(first + i) % MAX_SEED)
            ask = replace(ask, sampling=sampling)
        generation = _answer(adapters, ask)
        yield generation
        generation.wait_for_draft()  # which all share
        if generation.is_cancelled:
            return
        by = replace(generation.fusion, probe_ms=0.0)
        weighing = replace(ask.weighing, by=by, drafts=False)
        ask = replace(ask, weighing=weighing, on_weights=silent, on_progress=silent)


def answer_many(
    adapters: "AdapterSet", asks: Iterable[Ask | QafloraError], n_parallel: int
) -> Iterator[tuple[int, Generation]]:
    """Answer what is asked, n_parallel of it together, as Engine.submit_many does."""
    core = adapters.core
    source = enumerate(asks)
    running: dict[int, Generation] = {}
    cancellation = core.cancellation()
    while True:
        # One more than fit: it is weighed while the others are decoded.
        n_more = 0 if cancellation.is_set else n_parallel + 1 - len(running)
        for index, ask in itertools.islice(source, n_more):
            running[index] = _begun(adapters, ask)
        if not running:
            return
        with core.call():
            core.loop.drive(lambda: any(one.is_step_done for one in running.values()))
        for generation in running.values():
            generation.go_on()
        for index in [i for i, generation in running.items() if generation.is_done]:
            yield index, running.pop(index)


def _begun(adapters: "AdapterSet", ask: Ask | QafloraError) -> Generation:
    """Begin one of many; its errors end itself alone."""
    if isinstance(ask, QafloraError):
        return failed(adapters.core, ask)
    try:
        return answer(adapters, replace(ask, waits=False))
    except QafloraError as error:
        return failed(adapters.core, error)


def score(
    adapters: "AdapterSet", weighing: Weighing, pairs: Sequence[tuple[Prompt, tuple[int, ...]]]
) -> list[F32]:
    """Score each prompt's continuation as Engine.score does: float32 [n_token] each, in nats."""
    core = adapters.core
    cancellation = core.cancellation()
    requests: dict[tuple[int, ...], Request] = {}
    items = []
    for prompt, tokens in pairs:
        if prompt.tokens not in requests:
            choice = adapters.weigher.choice(prompt, weighing)
            requests[prompt.tokens] = _scored(core, choice, prompt, len(tokens), cancellation)
        items.append((requests[prompt.tokens], tokens))
    return core.run(core.scorer.score(items), cancellation, contexts="branch")


def _scored(
    core: "Core", choice: Choice, prompt: Prompt, n_after: int, cancellation: Cancellation
) -> Request:
    """Plan for a prompt after which n_after tokens are scored; drafts are written first."""
    writing = Writing(core, Ask(prompt), None, cancellation, choice.is_read_by_base, n_after)
    n_room = DRAFT_TOKENS if choice.drafts else 0
    with PromptReading(core, choice.query, cancellation, n_answer=n_room) as reading:
        fusion = choice.weigh(reading)
        while isinstance(fusion.step, DraftStep):
            fusion = writing.draft(fusion, reading)
    return writing.request(fusion)


def _n_room(choice: Choice, sampler: Sampler, n_answer: int | None) -> int | None:
    """Count the tokens that may follow where the prompt is read; None: no limit."""
    n_room = n_answer if choice.is_read_by_base else 0
    if n_room is not None and (choice.drafts or sampler.constraint):
        n_room = max(n_room, DRAFT_TOKENS)  # who drafts may go on in the same slot
    return n_room


@dataclass(frozen=True)
class Writing:
    """Run one answer's plan: begin a step, and note the draft once it has ended.

    ask      with its prompt as the base reads it
    sampler  of the answer, None where that is not written; drafts are greedy
    is_read_by_base  whether the base prefills the answer's prompt
    n_after  tokens that follow the prompt in any case
    """

    core: "Core"
    ask: Ask
    sampler: Sampler | None
    cancellation: Cancellation
    is_read_by_base: bool
    n_after: int = 0

    @property
    def prompt(self) -> Prompt:
        prompt = self.ask.prompt
        assert isinstance(prompt, Prompt)
        return prompt

    def fits(self, text: str) -> bool:
        """Tell whether an answer that begins so, unbound, has the form that binds it."""
        calls = self.prompt.calls
        if calls is not None and calls.begins(text):
            return True
        begun = text.lstrip().removeprefix("```json").removeprefix("```")
        assert self.sampler is not None
        assert self.sampler.constraint is not None
        return self.sampler.constraint.may_begin(begun.lstrip())

    def begin(self, fusion: FusionWeights, reading: PromptReading | None = None) -> RunningSequence:
        """Begin the next step.

        reading  of the prompt: a slot has it, perhaps, and drafts begin; the step goes on there.
                 None: a step before has been told, so that a cancelled one ends and does not fail
        """
        step = fusion.step
        request = self.request(fusion)
        sampler = self.sampler
        if isinstance(step, DraftStep):
            sampler = Sampler(self.core.model, request.sampling)
        resumed = None
        draft_state = None
        if reading is not None:
            is_read = self.is_read_by_base and request.tokens == self.prompt.tokens
            if is_read and request.n_base:
                resumed = reading.take()
            if resumed is not None:
                draft_state = reading.draft_state(request.weights)
            reading.end()
        return self.core.begin(
            request,
            sampler,
            guesses=step.guesses,
            resumed=resumed,
            draft_state=draft_state,
            is_told=reading is None,
        )

    def note(self, fusion: FusionWeights, sequence: RunningSequence) -> FusionWeights:
        """Add the draft of the step whose sequence has ended."""
        step = fusion.step
        assert isinstance(step, DraftStep)
        times = sequence.timings
        draft = Draft(
            adapter=step.knower,
            tokens=tuple(sequence.answer),
            text=self.core.model.text(sequence.answer),
            logprobs=tuple(entry.logprob for entry in sequence.logprobs),
            is_whole=sequence.finish_reason == "stop",
            draft_ms=times.prefill_ms + times.decode_ms,
        )
        return replace(fusion, drafts=(*fusion.drafts, draft))

    def draft(self, fusion: FusionWeights, reading: PromptReading) -> FusionWeights:
        """Run the next step, which drafts, to its end."""
        sequence = self.begin(fusion, reading)
        try:
            self.core.loop.drive(lambda: sequence.is_done)
        except BaseException:
            self.cancellation.set()
            raise
        if sequence.error is not None:
            raise sequence.error
        return self.note(fusion, sequence)

    def request(self, fusion: FusionWeights) -> Request:
        """Give the request of the next step."""
        core = self.core
        step = fusion.step
        tokens = self._tokens(fusion)
        n_base = numbers.n_base_of(len(tokens))
        if isinstance(step, DraftStep):
            weights = core.weights_of(step.knower)
            if step.mix is not None:
                weights = core.all_weights(fusion.adapters, step.mix)
            sampling = Sampling(max_tokens=DRAFT_TOKENS, logprobs=0)
            adapters = (step.knower,)
            return Request(
                tokens, weights, sampling, adapters, n_base, cancellation=self.cancellation
            )
        # A writer reads a draft itself, and what follows.
        n_base = min(n_base, n_common(self.prompt.tokens, tokens)) if self.is_read_by_base else 0
        return Request(
            tokens,
            core.all_weights(fusion.adapters, fusion.weights),
            self.ask.sampling,
            fusion.adapters,
            n_base,
            None if self.ask.parse_special else self.prompt.thinking,
            self.cancellation,
        )

    def _tokens(self, fusion: FusionWeights) -> tuple[int, ...]:
        """Give the prompt of the next step: the caller's, or with what it is asked or sees too."""
        step = fusion.step
        model = self.core.model
        question = self.prompt.question
        n_ctx = self.core.n_ctx - self.n_after
        tokens: Sequence[int] = self.prompt.tokens
        if isinstance(step, DraftStep) and step.is_in_words:
            tokens = in_words(model, tokens, question, n_ctx)
        if step.view and fusion.drafts:
            tokens = with_draft(model, tokens, question, fusion.drafts[-1], n_ctx)
        return tuple(tokens)


def in_words(
    model: Model, tokens: Sequence[int], question: tuple[int, int] | None, n_ctx: int
) -> Sequence[int]:
    """Ask for an answer in words, behind the question of a prompt, where there is room."""
    told = model.tokenize_inside(IN_WORDS)
    if question is None or len(tokens) + len(told) >= n_ctx:
        return tokens
    _, end = question
    return [*tokens[:end], *told, *tokens[end:]]


def with_draft(
    model: Model,
    tokens: Sequence[int],
    question: tuple[int, int] | None,
    draft: Draft,
    n_ctx: int,
) -> Sequence[int]:
    """Put a draft in parentheses before the question, as if it had been asked so.

    tokens    of the prompt
    question  begin and end of the question in it, as prompt.tokens.find_question gives them
    n_ctx     tokens of the context; a draft takes half of what is free there, at most

    The base answers in the language that comes last, and forms copy a draft that comes first more
    often.

    A control token that is spelt out in the draft stays text. Without room, or words, the prompt
    stays as it is.
    """
    if question is None:
        return tokens
    start, end = question
    n_room = (n_ctx - len(tokens)) // 2
    said = model.text(draft.tokens[: max(0, n_room)]).strip()
    if not said:
        return tokens
    asked = model.detokenize(tokens[start:end]).decode("utf-8", "replace")
    words = asked.lstrip(" ")
    space = asked[: len(asked) - len(words)]  # SentencePiece's first word brings its own
    told = model.tokenize_inside(f"{space}({said})\n\n{words}")
    prompt = [*tokens[:start], *told, *tokens[end:]]
    n_more = len(prompt) - len(tokens)  # bytes that are no text become more tokens
    has_room = n_more <= n_room + _N_AROUND and len(prompt) < n_ctx
    return prompt if has_room else tokens
