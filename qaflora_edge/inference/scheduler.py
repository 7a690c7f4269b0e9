"""The scheduler: which request is prefilled, decoded or probed next. It only decides."""

from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from qaflora_edge.backend.batch import Chunks
from qaflora_edge.errors import QafloraError
from qaflora_edge.inference.sequence import Cancellation, RunningSequence, State


@dataclass(eq=False, repr=False)
class Job:
    """Advance work other than answers, such as a probe, by one micro-batch at a time.

    contexts  "branch" or "probe", which it computes in: jobs of the same run one after the other
    n_done  the last number that the generator yielded
    is_begun  whether a step had it: no other may use its contexts until it is done
    """

    contexts: str
    steps: Generator[int | None, None, Any]
    cancellation: Cancellation
    is_done: bool = False
    n_done: int = 0
    is_begun: bool = False
    result: Any = None
    error: BaseException | None = None

    @property
    def is_cancelled(self) -> bool:
        return self.cancellation.is_set

    def advance(self) -> None:
        """Compute the next part; an error is kept for the caller that waits."""
        try:
            self.n_done = next(self.steps) or self.n_done
        except StopIteration as end:
            self.result = end.value
            self.is_done = True
        except BaseException as error:
            self.error = error
            self.is_done = True
            if not isinstance(error, Exception):  # KeyboardInterrupt is for the driver
                raise

    def fail(self, error: QafloraError) -> None:
        self.steps.close()
        self.error = error
        self.is_done = True


@dataclass
class Slot:
    """Note one sequence of the answering context, and its KV state.

    tokens   ids of the KV state
    prompt   of the last RunningSequence
    n_exact  its tokens that may be reused, once here: bit for bit by a prompt with the same chunks
    n_tail   tokens after those that the base prefilled
    weights  the key of the weights that those were computed under; None where there are none
    turn     number of its last RunningSequence
    """

    number: int
    sequence: RunningSequence | None = None
    tokens: list[int] = field(default_factory=list)
    prompt: Sequence[int] = ()
    n_exact: int = 0
    n_tail: int = 0
    weights: bytes | None = None
    turn: int = 0

    def n_reused(self, sequence: RunningSequence, chunks: Chunks, *, is_soon: bool = False) -> int:
        """Count the tokens of a prompt that can be reused from here, at most all but the last one.

        That is what prefill under its weights would compute, bit for bit.

        is_soon  count what is here once the prompt is prefilled
        """
        request = sequence.request
        if self.weights != request.weights_key:
            return 0
        n_there = self.n_exact if is_soon else min(self.n_exact, len(self.tokens))
        n_shared = chunks.n_shared(
            self.prompt,
            request.tokens,
            n_tail=request.n_tail,
            n_there=n_there,
            n_tail_there=self.n_tail,
        )
        if sequence.listener is None or n_shared <= sequence.listener.start:
            return n_shared
        if chunks.is_exact:
            return sequence.listener.start
        cut = 0
        while (end := request.chunk_end(chunks, cut)) <= sequence.listener.start:
            cut = end
        return cut

    def hold(self, sequence: RunningSequence, n_kept: int) -> None:
        """Note a new prompt, which reuses its first n_kept tokens."""
        request = sequence.request
        self.weights = request.weights_key
        self.tokens = list(request.tokens[:n_kept])
        self.prompt = request.tokens
        self.n_exact = request.n_read_by_base or len(request.tokens)
        self.n_tail = request.n_tail

    def forget(self) -> None:
        self.tokens = []
        self.n_exact = 0
        self.weights = None

    def take(self, other: Self) -> None:
        """Take over another slot's sequence and KV state, and leave it empty."""
        self.copy(other)
        self.sequence = other.sequence
        self.turn = other.turn
        other.sequence = None
        other.turn = 0
        other.forget()

    def copy(self, other: Self) -> None:
        """Note a copy of another slot's KV state."""
        self.tokens = list(other.tokens)
        self.weights = other.weights
        self.prompt = other.prompt
        self.n_exact = other.n_exact
        self.n_tail = other.n_tail


@dataclass
class Step:
    """List what is computed before the scheduler is asked again, in this order.

    copies    (from, to): slots to copy KV state between, because prompts begin alike
    moves     (from, to): slots to move KV state between, so that those in use are adjacent
    admitted  (sequence, tokens that may be reused in its slot)
    decode    sequences with one token each, all in one batch
    prefill   (sequence, how many tokens of its prompt), one batch each
    job       one micro-batch of it; never in a step with prefill
    """

    copies: list[tuple[int, int]] = field(default_factory=list)
    moves: list[tuple[int, int]] = field(default_factory=list)
    admitted: list[tuple[RunningSequence, int]] = field(default_factory=list)
    decode: list[RunningSequence] = field(default_factory=list)
    prefill: list[tuple[RunningSequence, int]] = field(default_factory=list)
    job: Job | None = None

    @property
    def is_empty(self) -> bool:
        """Tell whether nothing is computed: one who is owed time waits for weights."""
        return not (self.decode or self.prefill or self.job)

    def count(self, seconds: float) -> None:
        """Note how long it took, or its share of that time, for each call that it computed for."""
        sequences = [*self.decode, *(sequence for sequence, _ in self.prefill)]
        calls = {sequence.request.cancellation for sequence in sequences}
        if self.job is not None:
            calls.add(self.job.cancellation)
        for call in calls:
            call.count(seconds)


class Scheduler:
    """Serve requests in order of arrival: for slots, for prefill, and for jobs.

    What a call begins later, such as the next step of a relay, comes before calls that came after.

    n_slot  sequences of the context
    n_running  requests that are decoded together, by default n_slot
    chunks  how prompts are cut into chunks. A step prefills one chunk of a long prompt, or several
            short prompts: no decoding request waits for more than a micro-batch.
    waiting, jobs  attributes: queues

    A prompt is long where more than one chunk of it has to be computed. After a chunk of a long one
    all that is not long has as much time as it took, together: short prompts, decoding, jobs, and
    who waits for weights. So a short request waits for one chunk, and then has half of the time,
    however many prompts are long. Of these the first and the shortest take turns.

    Short prompts and jobs alternate where there are both; decoding goes on in every step.
    """

    def __init__(self, n_slot: int, chunks: Chunks, n_running: int | None = None) -> None:
        self.slots = [Slot(number) for number in range(n_slot)]
        self.n_running = n_running or n_slot
        self.waiting: deque[RunningSequence] = deque()
        self.jobs: deque[Job] = deque()
        self._chunks = chunks
        self._is_jobs_turn = True
        self._last_contexts = ""
        self._owed_ms = 0.0  # to all that is not long
        self._is_shortest_turn = True

    @property
    def running(self) -> list[RunningSequence]:
        """List sequences that have a slot, in the order of their slots."""
        return [slot.sequence for slot in self.slots if slot.sequence is not None]

    @property
    def has_work(self) -> bool:
        """Tell whether a step would compute, or end, anything."""
        running = self.running
        can_admit = self.waiting and len(running) < self.n_running
        is_active = any(s.state is not State.WEIGHED or s.is_cancelled for s in running)
        return bool(self.jobs or is_active or can_admit)

    def remove_ended(self) -> None:
        """Remove what is done from queues and slots; KV state stays for reuse."""
        self.waiting = deque(s for s in self.waiting if not s.is_done)
        self.jobs = deque(job for job in self.jobs if not job.is_done)
        for slot in self.slots:
            sequence = slot.sequence
            if sequence is not None and sequence.is_done:
                if sequence.n_past < sequence.n_prompt:  # where its next chunk ends is unknown
                    slot.n_exact = 0
                sequence.slot = None
                slot.sequence = None

    def step(self) -> Step:
        """Decide what comes next: an empty step without work."""
        step = Step()
        self._admit(step)
        self._move(step)
        running = self.running
        step.decode = [sequence for sequence in running if sequence.state is State.DECODE]
        prefills = self._prefills(running)
        if self.jobs and (self._is_jobs_turn or not prefills):
            step.job = self._next_job()
            step.job.is_begun = True
            self._last_contexts = step.job.contexts
            self._is_jobs_turn = False
            return step
        self._is_jobs_turn = True
        n_left = self._chunks.n_most
        for sequence in prefills:
            at = sequence.n_past
            n = sequence.request.chunk_end(self._chunks, at) - at
            n_left -= self._chunks.n_row_as_long(at, n)
            if step.prefill and n_left < 0:
                break
            step.prefill.append((sequence, n))
        return step

    def _next_job(self) -> Job:
        """Choose one that has begun, else of the earliest call; jobs of other contexts in turn.

        So a long job does not block those of other contexts, and none of its own interrupts it.
        """
        jobs = sorted(self.jobs, key=lambda job: (not job.is_begun, job.cancellation.number))
        others = (job for job in jobs if job.contexts != self._last_contexts)
        return next(others, jobs[0])

    def note(self, step: Step, ms: float) -> None:
        is_long = any(self._is_long(sequence) for sequence, _ in step.prefill)
        self._owed_ms = ms if is_long else self._owed_ms - ms

    def _is_long(self, sequence: RunningSequence) -> bool:
        """Tell whether others have to be protected from a prompt, until all of it is there."""
        n_row = self._chunks.n_row_as_long(sequence.n_cached, _n_new(sequence))
        return n_row > self._chunks.n_most

    def _prefills(self, running: list[RunningSequence]) -> list[RunningSequence]:
        """List what is prefilled in this step: a long prompt, or short ones in order of arrival."""
        prefills = [sequence for sequence in running if sequence.state is State.PREFILL]
        prefills.sort(key=lambda sequence: sequence.arrival)
        long = [sequence for sequence in prefills if self._is_long(sequence)]
        short = [sequence for sequence in prefills if sequence not in long]
        has_others = bool(self.jobs) or len(running) > len(long)
        if not long or (has_others and self._owed_ms > 0):
            return short
        if short and short[0].arrival < long[0].arrival:
            return short
        self._is_shortest_turn = not self._is_shortest_turn
        chosen = min(long, key=_n_new) if self._is_shortest_turn else long[0]
        return [chosen]

    def _admit(self, step: Step) -> None:
        """Give slots in the order of arrival; who waits for a prompt to reuse lets others pass."""
        for sequence in sorted(self.waiting, key=lambda sequence: sequence.arrival):
            if len(self.running) >= self.n_running:
                return
            free = [slot for slot in self.slots if slot.sequence is None]
            slot = max(free, key=lambda slot: self._fitness(slot, sequence))
            source = max(self.slots, key=lambda other: self._worth(other, sequence))
            n_here = slot.n_reused(sequence, self._chunks)
            n_there = source.n_reused(sequence, self._chunks)
            # What can be reused once all prompts are prefilled that are begun is worth a wait.
            n_soon = 0
            for other in self.slots:
                if other.sequence is not None and other.sequence.state is State.PREFILL:
                    n_soon = max(n_soon, other.n_reused(sequence, self._chunks, is_soon=True))
            n_least = self._chunks.n_least
            if n_soon >= max(n_here, n_there) + n_least:
                continue
            self.waiting.remove(sequence)
            n_reused = n_here
            if n_there >= n_here + n_least:
                slot.copy(source)
                step.copies.append((source.number, slot.number))
                n_reused = n_there
            slot.hold(sequence, n_reused)
            slot.sequence = sequence
            slot.turn = sequence.number
            sequence.slot = slot.number
            sequence.n_past = n_reused
            sequence.n_cached = n_reused
            step.admitted.append((sequence, n_reused))

    def resume(self, sequence: RunningSequence) -> None:
        """Go on with a sequence that was weighed: with what its base keeps of the prompt."""
        assert sequence.slot is not None
        request = sequence.request
        sequence.listener = None
        sequence.n_past = request.n_base
        if self._chunks.is_exact and not request.weights.any():
            sequence.n_past = sequence.n_prompt - 1  # the base itself answers: one row has logits
        self.slots[sequence.slot].hold(sequence, sequence.n_past)

    def _worth(self, slot: Slot, sequence: RunningSequence) -> tuple[int, int]:
        """Prefer most reuse; then fewest tokens, as all of them are copied."""
        return slot.n_reused(sequence, self._chunks), -len(slot.tokens)

    def _fitness(self, slot: Slot, sequence: RunningSequence) -> tuple[int, int, bool, int]:
        """Prefer most reuse; then next to slots in use; then empty; then least recently used."""
        used = [other.number for other in self.slots if other.sequence is not None]
        gap = 1
        if used:
            gap = max(gap, min(used) - slot.number, slot.number - max(used))
        n_reused = slot.n_reused(sequence, self._chunks)
        return n_reused, -gap, not slot.tokens, -slot.turn

    def _move(self, step: Step) -> None:
        """Close gaps between slots that decode: llama.cpp 0c1e5709 batches adjacent ones only.

        A sequence that moves replaces KV state that is not in use. None moves while its prompt is
        prefilled: a slot with states that nobody has read is zeroed before it is used again.
        """
        decoding = []
        for slot in self.slots:
            if slot.sequence is not None and slot.sequence.state is not State.PREFILL:
                decoding.append(slot)
        for target in self.slots:
            if not decoding or not decoding[0].number < target.number < decoding[-1].number:
                continue
            if target.sequence is not None:
                continue
            source = decoding.pop()
            assert source.sequence is not None
            source.sequence.slot = target.number
            target.take(source)
            step.moves.append((source.number, target.number))


def _n_new(sequence: RunningSequence) -> int:
    """Count the tokens of a prompt that had no KV state when it got its slot."""
    return sequence.n_prompt - sequence.n_cached
