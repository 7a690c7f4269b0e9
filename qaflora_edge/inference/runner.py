"""The runner: computes what the scheduler decided, and decides nothing."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from qaflora_edge.arrays import F32
from qaflora_edge.backend.batch import Outputs, Span
from qaflora_edge.backend.context import Context
from qaflora_edge.backend.model import Model
from qaflora_edge.errors import BackendError, CancelledError, QafloraError
from qaflora_edge.inference.guesses import guess_together
from qaflora_edge.inference.sampler import no_numbers
from qaflora_edge.inference.scheduler import Slot, Step
from qaflora_edge.inference.sequence import (
    DraftState,
    RunningSequence,
    TokenLogprob,
    surprise,
    token_logprob,
)


@dataclass(eq=False, repr=False)
class Runner:
    """Prefill prompts and decode tokens in the slots of one context.

    computing  called before each native call with the sequences that wait for it
    """

    vocabulary: Model
    context: Context
    computing: Callable[[Sequence[RunningSequence]], None]
    _spoilt: list[int] = field(default_factory=list)  # slots with states that are NaN
    _cut: set[int] = field(default_factory=set)  # sequences with other chunks than planned
    _weights: dict[int, F32] = field(default_factory=dict)  # that each slot has
    _unread: set[int] = field(default_factory=set)  # slots with part of a prompt: it may be NaN

    def run(self, step: Step, slots: Sequence[Slot]) -> None:
        """Compute a step, except its job. A failure ends only the sequences that it concerns."""
        for sequence, _ in step.admitted:
            if sequence.n_ctx > self.context.n_ctx:
                self._grow(sequence)
        for source, target in step.copies:
            self._copy(source, target)
        for source, target in step.moves:
            self._copy(source, target)
            self.context.clear(source)
        for sequence, n_reused in step.admitted:
            self._admit(sequence, slots[_slot(sequence)], n_reused)
        if step.decode:
            self._decode(step.decode, slots)
        for sequence, n in step.prefill:
            if not sequence.is_done:
                self._prefill(sequence, slots[_slot(sequence)], n)
        while self._spoilt:
            slot = slots[self._spoilt.pop()]
            self._clean(slot.number)
            slot.forget()

    def forget(self, slots: Sequence[Slot]) -> None:
        """Empty all slots, after an interruption."""
        self.context.clear()
        for slot in slots:
            slot.forget()

    def _grow(self, sequence: RunningSequence) -> None:
        self._weights.clear()
        try:
            self.context.resize(sequence.n_ctx)
        except (BackendError, OSError, MemoryError) as error:  # no memory for copies of KV states
            sequence.fail(BackendError(f"The context cannot grow: {error}"))

    def shrink(self, n_ctx: int, slots: Sequence[Slot]) -> None:
        """Give memory back, and with it the KV states of more than n_ctx tokens."""
        for slot in slots:
            if len(self.context.tokens[slot.number]) > n_ctx:
                self.context.clear(slot.number)
                slot.forget()
        self._weights.clear()
        with contextlib.suppress(BackendError, MemoryError):  # nothing changes then
            self.context.resize(n_ctx)

    def _copy(self, source: int, target: int) -> None:
        if target in self._unread:
            self._clean(target)
        self.context.copy(source, target)
        if source in self._unread:
            self._unread.add(target)

    def _clean(self, number: int) -> None:
        self._unread.discard(number)
        self.context.clean(number)

    def _admit(self, sequence: RunningSequence, slot: Slot, n_reused: int) -> None:
        if n_reused == 0 and slot.number in self._unread:
            self._clean(slot.number)
        n_kept = self.context.keep(n_reused, slot.number)
        sequence.n_past = n_kept
        sequence.n_cached = n_kept
        if n_kept < n_reused:  # the memory could not forget what came after it
            slot.hold(sequence, 0)
            self._cut.add(sequence.number)

    def _prefill(self, sequence: RunningSequence, slot: Slot, n: int) -> None:
        """Compute one chunk: the scheduler's turns drive it, not the loop of branches.prefill."""
        if sequence.draft_state is not None:
            self._take_over(sequence, slot, sequence.draft_state)
            return
        start = sequence.n_past
        listener = sequence.listener
        if sequence.number in self._cut or self.context.keep(start, slot.number) < start:
            self._cut.discard(sequence.number)  # its chunk begins elsewhere: next time
            sequence.n_past = 0
            slot.hold(sequence, 0)
            return
        end = start + n
        tokens = sequence.request.tokens[start:end]
        is_last = end == sequence.n_prompt
        self.computing([sequence])
        self._unread.add(slot.number)
        self._set_weights(sequence, slot.number)
        hears = listener if listener and end > listener.start else None
        scored: list[int] = []  # rows
        if hears:
            scored = [at - start for at in hears.scored if start <= at < end]
        hears_next = bool(is_last and hears and hears.hears_next)
        last = n - 1
        outputs: Outputs = [*scored, last] if hears_next else scored
        if is_last and listener is None:
            outputs = "last"
        try:
            if hears:
                self.context.capture_begin("inputs")
            (last_row,) = self.context.decode_spans([Span(slot.number, tokens, start, outputs)])
            if hears:
                hears.take(start, self.context.inputs(slot.number, n))
                for row in scored:
                    next_token = sequence.request.tokens[start + row + 1]
                    hears.nats += surprise(self.context.logits_view(row), next_token)
                if hears_next:
                    hears.next_logits = self.context.logits_view(last).copy()
        except CancelledError:
            return  # the scheduler's owner ends it
        except BackendError as error:
            sequence.fail(error)
            return
        finally:
            if hears:
                self.context.capture_begin("none")
        sequence.n_past = end
        slot.tokens.extend(tokens)
        if is_last:
            self._unread.discard(slot.number)
            if listener is None:
                self._begin(sequence, last_row)

    def _take_over(self, sequence: RunningSequence, slot: Slot, state: DraftState) -> None:
        """Begin an answer with what was drafted of it: as if it had been computed here."""
        draft = state.draft
        assert state.kv_state is not None
        sequence.draft_state = None
        try:
            self.context.load_sequence(slot.number, state.kv_state)
        except BackendError:  # another shape: the prompt is prefilled, as without a draft
            sequence.n_past = 0
            slot.hold(sequence, 0)
            return
        sequence.n_past = len(state.kv_state.tokens)
        for token, logprob in zip(draft.tokens, draft.logprobs, strict=True):
            data = self.vocabulary.piece(token)
            if sequence.request.sampling.logprobs is not None:
                spelling = self.vocabulary.piece(token, special=True)
                entry = TokenLogprob(token, spelling, logprob, n_shown=len(data))
                sequence.logprobs.append(entry)
            sequence.take(token, data)
            if sequence.is_done:
                break
        if draft.is_whole and not sequence.is_done:
            sequence.finish("stop")
        # What is held has to be what was shown, where the answer has ended before the draft.
        n_held = sequence.n_prompt + len(sequence.answer)
        sequence.n_past = self.context.keep(min(sequence.n_past, n_held), slot.number)
        slot.tokens = list(self.context.tokens[slot.number])

    def _set_weights(self, sequence: RunningSequence, slot: int) -> None:
        weights = sequence.request.next_weights(sequence.n_past)
        if self._weights.get(slot) is not weights:
            self.context.set_weights(weights, seq=slot)
            self._weights[slot] = weights

    def _begin(self, sequence: RunningSequence, row: int) -> None:
        if np.isnan(self.context.logits_view(row)).any():
            self._spoilt.append(_slot(sequence))
            adapters = f" ({', '.join(sequence.request.adapters) or 'none'})"
            sequence.fail(no_numbers("The logits after the prompt", adapters))
        elif sequence.n_max == 0:
            sequence.logits = self.context.logits_view(row).copy()
            sequence.finish("length")
        else:
            self._sample(sequence, row)

    def _decode(self, group: Sequence[RunningSequence], slots: Sequence[Slot]) -> None:
        spans = []
        for sequence, guess in zip(group, guess_together(group, self.context.n_ctx), strict=True):
            tokens = [sequence.answer[-1], *guess]
            spans.append(Span(_slot(sequence), tokens, sequence.n_past, "all"))
            self._set_weights(sequence, _slot(sequence))
        self.computing(group)
        try:
            rows = self.context.decode_spans(spans)
        except CancelledError:
            return
        except BackendError as error:
            self._decode_apart(group, slots, error)
            return
        for sequence, span, row in zip(group, spans, rows, strict=True):
            first_row = row + 1 - len(span.tokens)
            self._choose(sequence, slots[span.seq], span, first_row, len(group))

    def _choose(
        self, sequence: RunningSequence, slot: Slot, span: Span, row: int, n_sequence: int
    ) -> None:
        """Choose the token after each row from this one on, as long as the next was guessed."""
        n_before = sequence.n_past
        for token in span.tokens:
            if sequence.is_done or token != sequence.answer[-1]:
                break
            sequence.n_past += 1
            slot.tokens.append(token)
            sequence.timings.n_decoded += 1
            self._sample(sequence, row)
            row += 1
        if sequence.guesser is not None and len(span.tokens) > 1:
            self.context.keep(sequence.n_past, slot.number)
            n_guessed = len(span.tokens) - 1
            n_right = sequence.n_past - n_before - 1
            sequence.guesser.learn(n_guessed, n_right, n_sequence)
            sequence.timings.guessed_n += n_guessed
            sequence.timings.guessed_n_right += n_right

    def _decode_apart(
        self, group: Sequence[RunningSequence], slots: Sequence[Slot], error: BackendError
    ) -> None:
        for sequence in group:
            is_lost = len(self.context.tokens[_slot(sequence)]) != sequence.n_past
            if len(group) == 1 or is_lost:  # states that cannot be taken back are lost
                sequence.fail(error)
            else:
                self._decode([sequence], slots)

    def _sample(self, sequence: RunningSequence, row: int) -> None:
        assert sequence.sampler is not None
        try:
            token = sequence.sampler.sample(self.context, row)
            if self.vocabulary.is_end(token) and sequence.close_thought():
                token = sequence.sampler.sample(self.context, row)
        except QafloraError as error:
            if isinstance(error, BackendError):  # no numbers
                self._spoilt.append(_slot(sequence))
            sequence.fail(error)
            return
        piece = self.vocabulary.piece
        data = None if self.vocabulary.is_end(token) else sequence.tags.get(token) or piece(token)
        n_top = sequence.request.sampling.logprobs
        if n_top is not None and data is not None:
            logits = self.context.logits_view(row)
            spelt = partial(piece, special=True)
            entry = token_logprob(logits, token, n_top, spelt, len(data))
            sequence.logprobs.append(entry)
        sequence.take(token, data)


def _slot(sequence: RunningSequence) -> int:
    assert sequence.slot is not None
    return sequence.slot
