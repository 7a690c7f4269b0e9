"""A generation: an answer as its caller sees it."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

from qaflora_edge.arrays import F32
from qaflora_edge.errors import QafloraError
from qaflora_edge.inference.sequence import Cancellation, RunningSequence, Timings, TokenLogprob
from qaflora_edge.progress import Tell, silent
from qaflora_edge.weighing.numbers import FusionWeights

if TYPE_CHECKING:
    from qaflora_edge.prompt.calls import Calls
    from qaflora_edge.weighing.drafted import Draft


def follow(
    drive: Callable[[Callable[[], bool]], None],
    sequence: RunningSequence,
    tell: Callable[[int, int], Any],
) -> None:
    """Compute until a prompt is prefilled; tell how many tokens are done, and how many it has."""
    n_told = 0

    def n_read() -> int:
        return min(sequence.n_past, sequence.n_prompt)  # it may be answered already

    def is_read() -> bool:
        return sequence.is_done or sequence.n_past >= sequence.n_prompt

    def has_more() -> bool:
        return is_read() or n_read() > n_told

    while not is_read():
        tell(n_told, sequence.n_prompt)
        drive(has_more)
        n_told = n_read()
    tell(n_read(), sequence.n_prompt)


class Generation(Iterator[str]):
    """Iterate over an answer as it is generated, in pieces of text.

    An answer that is dropped before its end is cancelled. One that is kept goes on while other
    calls of its Engine compute, and its pieces wait.

    fusion     the weights of prefill and answer
    go_on      of a relay, whose draft is `sequence` at first: gives the writer's answer, and its
               weights with the draft, once that has ended
    reasoning  attribute: what was taken of the thought before the answer
    calls      attribute: how it may call tools; None: the base was told of none
    """

    def __init__(
        self,
        sequence: RunningSequence,
        fusion: FusionWeights,
        *,
        drive: Callable[[Callable[[], bool]], None],
        call: Callable[[], AbstractContextManager[Any]],
        go_on: Callable[[], tuple[RunningSequence, FusionWeights]] | None = None,
    ) -> None:
        self._sequence = sequence
        self.fusion = fusion
        self._drive = drive
        self._call = call
        self.reasoning = ""  # what was taken of the thought
        self.calls: Calls | None = None
        self._n_taken = 0  # tokens of the answer until the last piece that was taken
        self._go_on = go_on
        self._drafted = sequence if go_on else None  # by which a relay's draft is told
        self._is_draft_told = False
        sequence.timings.probe_ms = fusion.probe_ms
        weakref.finalize(self, Cancellation.set, sequence.request.cancellation).atexit = False

    @property
    def is_done(self) -> bool:
        """Tell whether all of it is computed; pieces may still wait to be taken."""
        return not self.is_drafting and self._sequence.is_done

    @property
    def is_drafting(self) -> bool:
        """Tell whether the knower of a relay drafts, or waits for its turn."""
        return self._go_on is not None

    def advance(self) -> bool:
        """Begin a writer's answer where its draft has ended; tell whether all is computed.

        It holds the loop's lock: it is called as a condition of Loop.drive alone.
        """
        if self._go_on is not None and self._sequence.is_done:
            self._sequence, self.fusion = self._go_on()
            self._sequence.timings.probe_ms = self.fusion.probe_ms
            self._go_on = None
        return self.is_done

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
    def draft(self) -> "Draft | None":
        """Give the draft that the answer is written from, where there is one, as far as it is."""
        return None if self.fusion.relay is None else self.fusion.relay.draft

    @property
    def n_draft(self) -> int:
        """Count the tokens of the draft, which were generated too."""
        return 0 if self.draft is None else len(self.draft.tokens)

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
        with self._call():
            self._drive(self.advance)
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
        self._drive = silent  # contexts of replaced adapters are freed
        self._call = nullcontext
        if sequence.error is not None:
            raise sequence.error
        raise StopIteration

    def drafting(self) -> Iterator[str]:
        """Iterate over what is left of a relay's draft, in pieces of text.

        Iterating over the answer skips it. Either way `draft` has it.
        """
        drafted = self._drafted
        if drafted is None:
            if self.draft is not None and not self._is_draft_told:
                self._is_draft_told = True
                yield self.draft.text
            return
        while True:
            self._wait_for_piece(drafted)
            if not drafted.pieces:
                break
            piece, _, _ = drafted.pieces.popleft()
            yield piece
        self.wait_for_draft()

    def _wait_for_piece(self, sequence: RunningSequence) -> None:
        if not sequence.pieces and not sequence.is_done:
            with self._call():
                self._drive(lambda: bool(sequence.pieces) or sequence.is_done)

    def wait_for_draft(self) -> None:
        """Compute until a relay's draft is whole; without one do nothing."""
        if self.is_drafting:
            with self._call():
                self._drive(lambda: self.advance() or not self.is_drafting)

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
        follow(self._drive, sequence, partial(tell, "reading"))
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
