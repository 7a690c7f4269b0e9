"""A generation: an answer as its caller sees it."""

import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from qaflora_edge.arrays import F32
from qaflora_edge.ask import Sampling
from qaflora_edge.errors import QafloraError
from qaflora_edge.inference.sequence import (
    Cancellation,
    Request,
    RunningSequence,
    Timings,
    TokenLogprob,
)
from qaflora_edge.progress import Tell, silent
from qaflora_edge.weighing.plan import Draft, DraftStep, FusionWeights, Plan

if TYPE_CHECKING:
    from qaflora_edge.answering.answer import Writing
    from qaflora_edge.inference.core import Core
    from qaflora_edge.prompt.calls import Calls


class Generation(Iterator[str]):
    """Iterate over an answer as it is generated, in pieces of text.

    An answer that is dropped before its end is cancelled. One that is kept goes on while other
    calls of its Engine compute, and its pieces wait.

    Its plan may have several steps: where one has ended, the next begins when the caller asks for
    more, in the caller's thread.

    fusion     the weights of prefill and answer, the plan, and what was drafted so far
    sequence   of the first step that was not done
    writing    runs the plan; None: it has no other step
    reasoning  attribute: what was taken of the thought before the answer
    calls      attribute: how it may call tools; None: the base was told of none
    """

    def __init__(
        self,
        core: "Core",
        fusion: FusionWeights,
        sequence: RunningSequence,
        writing: "Writing | None" = None,
    ) -> None:
        self._core: Core | None = core
        self.fusion = fusion
        self._sequence = sequence
        self._writing = writing
        self.reasoning = ""  # what was taken of the thought
        self.calls: Calls | None = None if writing is None else writing.prompt.calls
        self._n_taken = 0  # tokens of the answer until the last piece that was taken
        self._draft_sequences: list[RunningSequence] = []  # whose pieces may wait
        self._is_draft_told = False
        self._follow(sequence)
        weakref.finalize(self, Cancellation.set, sequence.request.cancellation).atexit = False

    @property
    def is_done(self) -> bool:
        """Tell whether all of it is computed; pieces may still wait to be taken."""
        return not self.is_drafting and self._sequence.is_done

    @property
    def is_drafting(self) -> bool:
        """Tell whether a step before the last is computed, or waits for its turn."""
        return self._sequence in self._draft_sequences

    @property
    def is_step_done(self) -> bool:
        """Tell whether what is computed now has ended: go_on() begins what comes next."""
        return self._sequence.is_done

    def go_on(self) -> None:
        """Begin the next step of the plan where a draft has ended."""
        sequence = self._sequence
        if not self.is_drafting or not sequence.is_done:
            return
        assert self._core is not None
        assert self._writing is not None
        with self._core.call():
            if sequence.error is None:
                self.fusion = self._writing.note(self.fusion, sequence)
            if sequence.error is None and not sequence.is_cancelled:
                self._follow(self._writing.begin(self.fusion))
            else:
                self._sequence = _ended(sequence.request, sequence.error)
                self._sequence.timings.probe_ms = self.fusion.probe_ms

    def _follow(self, sequence: RunningSequence) -> None:
        """Follow the sequence of the plan's next step."""
        self._sequence = sequence
        sequence.timings.probe_ms = self.fusion.probe_ms
        if isinstance(self.fusion.step, DraftStep):
            self._draft_sequences.append(sequence)

    def _drive(self, is_ready: Callable[[], bool]) -> None:
        if self._core is not None:
            with self._core.call():
                self._core.loop.drive(is_ready)

    @property
    def is_cancelled(self) -> bool:
        return self._sequence.is_cancelled

    @property
    def finish_reason(self) -> str | None:
        """Say why it ended; None while there is more to come.

        "stop" (end of generation, or a stop text), "length" (max_tokens, or the context is full),
        "cancelled", or "error", which iterating raises.
        """
        if self.is_drafting or self._sequence.pieces:
            return None
        return self._sequence.finish_reason

    @property
    def stop(self) -> str | None:
        """Give the stop text that ended it; None where nothing or something else did."""
        return self._sequence.text.stop

    @property
    def is_whole(self) -> bool:
        """Tell whether its grammar is satisfied; False when "length" cut it before."""
        return self._sequence.is_whole

    @property
    def error(self) -> QafloraError | None:
        """Say why there is no whole answer."""
        return self._sequence.error

    @property
    def timings(self) -> Timings:
        return self._sequence.timings

    @property
    def prompt(self) -> tuple[int, ...]:
        return self._sequence.request.tokens

    @property
    def n_prompt(self) -> int:
        return self._sequence.n_prompt

    @property
    def n_cached(self) -> int:
        """Count the tokens of the prompt that were not prefilled: their KV state was there."""
        return self._sequence.n_cached

    @property
    def draft(self) -> Draft | None:
        """Give the draft that the answer is written from, where there is one, as far as it is."""
        return self.fusion.draft

    @property
    def n_draft(self) -> int:
        """Count the tokens of the draft, which were generated too."""
        return sum(len(draft.tokens) for draft in self.fusion.drafted)

    @property
    def n_completion(self) -> int:
        """Count the tokens of the answer so far, without an end token."""
        return 0 if self.is_drafting else len(self._sequence.answer)

    @property
    def n_thought(self) -> int:
        """Count those of them that are a thought, with its tags."""
        return self._sequence.n_thought

    @property
    def wants_logprobs(self) -> bool:
        return self._sequence.request.sampling.logprobs is not None

    @property
    def logprobs(self) -> list[TokenLogprob]:
        """Give log-probabilities of the tokens so far, where `logprobs` asked for them."""
        sequence = self._sequence
        is_all = sequence.is_done and not sequence.pieces
        return sequence.logprobs[:] if is_all else sequence.logprobs[: self._n_taken]

    @property
    def prompt_logits(self) -> F32:
        """Give float32 [n_vocab] after the prompt, where max_tokens is 0."""
        self.wait_for_draft()
        self._drive(lambda: self.is_step_done)
        if self._sequence.error is not None:
            raise self._sequence.error
        assert self._sequence.logits is not None
        return self._sequence.logits

    def __next__(self) -> str:
        for _ in self.thoughts():
            pass
        sequence = self._sequence
        if sequence.pieces:
            piece, self._n_taken, _ = sequence.pieces.popleft()
            return piece
        self._core = None  # contexts of replaced adapters are freed
        self._writing = None
        if sequence.error is not None:
            raise sequence.error
        raise StopIteration

    def drafting(self) -> Iterator[str]:
        """Iterate over what is left of a relay's draft, in pieces of text.

        Iterating over the answer skips it. Either way `draft` has it.
        """
        sequences = self._draft_sequences
        if not sequences and self.draft is not None and not self._is_draft_told:
            self._is_draft_told = True
            yield self.draft.text
        for sequence in sequences:
            self._wait_for_piece(sequence)
            while sequence.pieces:
                piece, _, _ = sequence.pieces.popleft()
                yield piece
                self._wait_for_piece(sequence)
            if sequence is self._sequence:
                self.go_on()  # to another draft, perhaps, which is one more of the sequences

    def _wait_for_piece(self, sequence: RunningSequence) -> None:
        if not sequence.pieces and not sequence.is_done:
            self._drive(lambda: bool(sequence.pieces) or sequence.is_done)

    def wait_for_draft(self) -> None:
        """Compute until the plan's last step begins."""
        while self.is_drafting:
            self._drive(lambda: self.is_step_done)
            self.go_on()

    def thoughts(self) -> Iterator[str]:
        """Iterate over what is left of the thought before the answer, in pieces of text.

        Iterating over the answer skips it. Either way `reasoning` has it.
        """
        for _ in self.drafting():
            pass
        sequence = self._sequence
        while True:
            self._wait_for_piece(sequence)
            if not sequence.pieces or not sequence.pieces[0][2]:
                return
            piece, self._n_taken, _ = sequence.pieces.popleft()
            self.reasoning += piece
            yield piece

    def wait_for_prompt(self, tell: Tell = silent) -> None:
        """Compute until the prompt is prefilled; raise what went wrong before the first token.

        tell  called with "reading", how many tokens are done, and how many there are
        """
        sequence = self._sequence
        if self._core is not None:
            self._core.loop.follow(sequence, partial(tell, "reading"))
        if sequence.error is not None and not sequence.answer:
            raise sequence.error

    def text(self) -> str:
        """Join the rest of the answer."""
        return "".join(self)

    def cancel(self) -> None:
        """End this answer; any thread may call it. It keeps its text so far."""
        self._sequence.request.cancellation.set()

    @property
    def usage(self) -> dict[str, int]:
        """Count tokens as OpenAI does; those of a draft were generated too."""
        n_generated = self.n_draft + self.n_completion
        return {
            "prompt_tokens": self.n_prompt,
            "completion_tokens": n_generated,
            "total_tokens": self.n_prompt + n_generated,
        }


def failed(core: "Core", error: QafloraError) -> Generation:
    """Make an answer that failed before its request was made."""
    nothing = np.zeros((0, core.model.n_layer), np.float32)
    fusion = FusionWeights((), Plan.mix(nothing))
    return Generation(core, fusion, _ended(Request((), nothing), error))


def _ended(request: Request, error: QafloraError | None) -> RunningSequence:
    """Make a sequence without an answer: it has failed, or else is cancelled."""
    sequence = RunningSequence(replace(request, sampling=Sampling()), None, 0)
    if error is not None:
        sequence.fail(error)
    sequence.finish("cancelled")
    return sequence
