"""An answer: the prompt is read, the strategy plans, and the plan is written."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qaflora_edge.answering.generation import Generation
from qaflora_edge.answering.reading import PromptReading
from qaflora_edge.ask import Ask, Prompt, Sampling
from qaflora_edge.backend.batch import n_common
from qaflora_edge.inference.sampler import Sampler
from qaflora_edge.inference.sequence import Cancellation, Request, RunningSequence
from qaflora_edge.weighing import numbers
from qaflora_edge.weighing.plan import DRAFT_TOKENS, Draft, DraftStep, FusionWeights, Step
from qaflora_edge.weighing.strategy import Choice

if TYPE_CHECKING:
    from qaflora_edge.inference.core import Core
    from qaflora_edge.weighing.weigher import Weigher


def answer(core: "Core", weigher: "Weigher", ask: Ask) -> Generation:
    """Answer what is asked, with the prompt as the base reads it."""
    prompt = ask.prompt
    assert isinstance(prompt, Prompt)
    by = weigher.by_of(ask.weighing)
    choice = weigher.chosen(by)
    writing = Writing(
        core,
        prompt,
        ask.sampling,
        Sampler(core.model, ask.sampling),  # a bad grammar is refused before the work
        core.cancellation(ask.cancel),
        is_read_by_base=weigher.is_read_by_base(by, prompt, ask.weighing.prefill),
        keeps_thoughts=not ask.parse_special,
    )
    reading = PromptReading(
        core,
        weigher.query(prompt, choice),
        writing.cancellation,
        tell=ask.on_progress,
        n_answer=_n_room(choice, writing),
        on_draft=ask.on_draft,
    )
    with reading:
        fusion = weigher.weigh(choice, reading)
        if not ask.weighing.drafts:
            fusion = replace(fusion, plan=fusion.plan.undrafted())
        sequence = writing.begin(fusion, reading)
    generation = Generation(core, fusion, sequence, writing)
    ask.on_weights(fusion)
    if ask.waits:
        generation.wait_for_prompt(ask.on_progress)
    return generation


def _n_room(choice: Choice | FusionWeights, writing: "Writing") -> int | None:
    """Count the tokens that may follow where the prompt is read; None: no limit."""
    n_room = writing.sampling.max_tokens if writing.is_read_by_base else 0
    drafts = isinstance(choice, Choice) and choice.strategy.drafts
    if n_room is not None and drafts:
        n_room = max(n_room, DRAFT_TOKENS)  # who drafts may go on in the same slot
    return n_room


@dataclass(frozen=True)
class Writing:
    """Begin the steps of one answer's plan.

    prompt   the caller's
    sampling, sampler  of the answer; drafts are greedy
    is_read_by_base  whether the base prefills the answer's prompt
    keeps_thoughts  whether a thought is kept apart from the answer
    """

    core: "Core"
    prompt: Prompt
    sampling: Sampling
    sampler: Sampler
    cancellation: Cancellation
    is_read_by_base: bool
    keeps_thoughts: bool

    def begin(self, fusion: FusionWeights, reading: PromptReading | None = None) -> RunningSequence:
        """Begin the first step that is not done.

        reading  of the prompt: a slot has it, perhaps, and drafts begin; the step goes on there.
                 None: a step before has been told, so that a cancelled one ends and does not fail
        """
        at = fusion.plan.n_done
        step = fusion.plan.steps[at]
        request = self._request(fusion, step, fusion.plan.draft_before(at))
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

    def _request(self, fusion: FusionWeights, step: Step, draft: Draft | None) -> Request:
        tokens = prompt_of(self.core, self.prompt, step, draft)
        if isinstance(step, DraftStep):
            return Request(
                tokens,
                self.core.weights_of(step.knower),
                Sampling(max_tokens=DRAFT_TOKENS, logprobs=0),
                (step.knower,),
                numbers.n_base_of(len(tokens)),
                cancellation=self.cancellation,
            )
        return Request(
            tokens,
            self.core.all_weights(fusion.adapters, fusion.weights),
            self.sampling,
            fusion.adapters,
            n_base_of(self.prompt.tokens, tokens) if self.is_read_by_base else 0,
            self.prompt.thinking if self.keeps_thoughts else None,
            self.cancellation,
        )


def prompt_of(
    core: "Core", prompt: Prompt, step: Step, draft: Draft | None, n_after: int = 0
) -> tuple[int, ...]:
    """Give the prompt of a step: the caller's, or with what it is asked or sees beside.

    draft    of the step before
    n_after  tokens that follow the prompt in any case
    """
    tokens: Sequence[int] = prompt.tokens
    n_ctx = core.n_ctx - n_after
    if isinstance(step, DraftStep) and step.is_in_words:
        from qaflora_edge.prompt.draft import in_words

        tokens = in_words(core.model, tokens, prompt.question, n_ctx)
    if step.view and draft is not None:
        from qaflora_edge.prompt.draft import with_draft

        tokens = with_draft(
            core.model, tokens, prompt.question, draft, n_ctx, is_behind=step.view == "behind"
        )
    return tuple(tokens)


def n_base_of(asked: Sequence[int], read: Sequence[int]) -> int:
    """Count the tokens that the base prefills; a writer reads a draft itself, and what follows.

    asked, read  the prompt without the draft, and as it is prefilled
    """
    n_base = numbers.n_base_of(len(read))
    if read == asked:
        return n_base
    return min(n_base, n_common(asked, read))
