"""Who is computed next, with a context that only notes what it was given: no model."""

import random
import threading
import time
import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from patience import wait_until

from qaflora_edge.ask import Sampling
from qaflora_edge.backend.batch import Chunks, Span
from qaflora_edge.backend.library import Stop
from qaflora_edge.errors import BackendError, CancelledError
from qaflora_edge.inference.loop import Loop
from qaflora_edge.inference.scheduler import Job, Scheduler, Slot
from qaflora_edge.inference.sequence import Cancellation, Request, RunningSequence, State
from qaflora_edge.weighing.added import Listener

CHUNKS = Chunks(6, 3, 3, lambda token: token == 0)  # 8 tokens at most
END = 255


class NotedContext:
    """Cells of (token, weights) in place of KV state; what follows is a hash of all of them."""

    def __init__(self, n_slot: int) -> None:
        self.cells: list[list[tuple[int, bytes]]] = [[] for _ in range(n_slot)]
        self.weights = [b""] * n_slot
        self.batches: list[list[Span]] = []
        self.broken: set[int] = set()  # tokens that no batch may have

    n_ctx = 0

    def keep(self, n_token: int, seq: int) -> int:
        del self.cells[seq][n_token:]
        return len(self.cells[seq])

    def clear(self, seq: int | None = None) -> None:
        for i in range(len(self.cells)) if seq is None else [seq]:
            self.cells[i] = []

    clean = clear

    def copy(self, source: int, target: int) -> None:
        self.cells[target] = list(self.cells[source])

    def set_weights(self, weights: Any, *, seq: int = 0) -> None:
        self.weights[seq] = weights.tobytes()

    @property
    def tokens(self) -> list[list[int]]:
        return [[token for token, _ in cells] for cells in self.cells]

    def capture_begin(self, what: str) -> None:
        assert what in ("inputs", "none")

    def inputs(self, seq: int, n_row: int) -> Any:
        return self.cells[seq][-n_row:]

    def decode_spans(self, spans: Sequence[Span]) -> list[int]:
        if self.broken & {token for span in spans for token in span.tokens}:
            raise BackendError("broken")
        self.batches.append(list(spans))
        self.rows = [span.seq for span in spans]
        for span in spans:
            assert span.start == len(self.cells[span.seq])
            self.cells[span.seq] += [(token, self.weights[span.seq]) for token in span.tokens]
        return list(range(len(spans)))

    def logits_view(self, row: int = -1) -> Any:
        return np.zeros(1)

    def sample(self, sampler: Any, row: int = -1) -> int:
        return zlib.crc32(repr(self.cells[self.rows[row]]).encode()) % 251


class Heard(Listener):
    def __init__(self, start: int) -> None:
        self.start = start
        self.cells: dict[int, tuple[int, bytes]] = {}

    def take(self, at: int, inputs: Any) -> None:
        self.cells |= dict(enumerate(inputs, at))


class Vocabulary:
    def is_end(self, token: int) -> bool:
        return token == END

    def piece(self, token: int) -> bytes:
        return b"%d " % token


class Noting:
    constraint = None

    def sample(self, context: NotedContext, row: int) -> int:
        return context.sample(None, row)

    def can_end(self) -> bool:
        return True

    def close(self) -> None:
        pass


class Bench:
    def __init__(
        self, n_slot: int, n_running: int | None = None, *, is_exact: bool = False
    ) -> None:
        self.context = NotedContext(n_slot)
        chunks = replace(CHUNKS, is_exact=is_exact)
        self.scheduler = Scheduler(n_slot, chunks, n_running=n_running)
        self.loop = Loop(Vocabulary(), self.context, self.scheduler, Stop())

    def add(
        self,
        tokens: Sequence[int],
        weight: float = 1.0,
        n: int = 5,
        heard: Heard | None = None,
        **more: Any,
    ) -> RunningSequence:
        """Add a request; one that is heard is weighed first, and has all its weights then."""
        weights = np.full((1, 2), 0.0 if heard else weight, np.float32)
        request = Request(tuple(tokens), weights, Sampling(), **more)
        sequence = RunningSequence(request, None if heard else Noting(), n, 0, heard)
        self.loop.add(sequence)
        return sequence

    def weigh(self, sequence: RunningSequence, weight: float) -> None:
        old, weights = sequence.request, np.full((1, 2), weight, np.float32)
        sequence.start(replace(old, weights=weights), Noting(), sequence.n_max)
        self.loop.resume(sequence)

    def step(self) -> list[list[Span]]:
        self.context.batches = []
        steps = iter([False, True])
        self.loop.drive(lambda: next(steps))
        return self.context.batches

    def finish(self, *sequences: RunningSequence) -> None:
        self.loop.drive(lambda: all(sequence.is_done for sequence in sequences))


def alone(tokens: Sequence[int], weight: float = 1.0, n: int = 5, *, n_base: int = 0) -> list[int]:
    bench = Bench(1)
    sequence = bench.add(tokens, weight, n, n_base=n_base)
    bench.finish(sequence)
    return sequence.answer


def test_the_newest_waits_when_all_slots_are_taken_and_fails_nobody() -> None:
    bench = Bench(2)
    answers = [bench.add([i, i + 1], n=3 + i) for i in range(7)]
    bench.step()
    assert [answer.slot for answer in answers] == [0, 1] + [None] * 5
    bench.finish(*answers)
    assert [answer.answer for answer in answers] == [alone([i, i + 1], n=3 + i) for i in range(7)]


def test_what_a_call_begins_later_comes_before_calls_that_came_after() -> None:
    """The next step of a relay does not wait for a slot behind others."""
    bench = Bench(1)
    draft = bench.add([1, 2], n=2)
    other = bench.add([3, 4], n=2)
    answer = bench.add([5, 6], n=2, cancellation=draft.request.cancellation)
    bench.finish(answer)
    assert (draft.is_done, other.is_done) == (True, False)


def test_jobs_of_calls_are_in_the_order_of_calls() -> None:
    scheduler = Scheduler(1, CHUNKS)
    first, second = Cancellation(), Cancellation()
    nothing: Any = iter(())
    scheduler.jobs.extend([Job("probe", nothing, second), Job("probe", nothing, first)])
    job = scheduler.step().job
    assert job is not None
    assert job.cancellation is first


def test_a_job_that_has_begun_is_not_interrupted_by_one_of_its_kind() -> None:
    """They share a context: two at once would read each other's KV state."""
    scheduler = Scheduler(1, CHUNKS)
    first, second = Cancellation(), Cancellation()
    nothing: Any = iter(())
    begun, other = Job("branch", nothing, second), Job("probe", nothing, second)
    scheduler.jobs.append(begun)
    assert scheduler.step().job is begun
    scheduler.jobs.append(Job("branch", nothing, first))
    assert scheduler.step().job is begun
    scheduler.jobs.append(other)
    assert [scheduler.step().job for _ in range(4)] == [other, begun, other, begun]


def test_one_that_fails_ends_alone() -> None:
    bench = Bench(3)
    good = [bench.add([1, 2], n=9), bench.add([3, 4], n=9)]
    bad = bench.add([5, 6], n=9)
    right = [alone([1, 2], n=9), alone([3, 4], n=9)]
    bench.context.broken = {alone([5, 6], n=9)[3]}
    assert bench.context.broken.isdisjoint([1, 2, 3, 4, 5, 6, *right[0], *right[1]])
    bench.finish(*good, bad)
    assert isinstance(bad.error, BackendError)
    assert (bad.finish_reason, bad.answer) == ("error", alone([5, 6], n=9)[:4])
    assert [answer.answer for answer in good] == right


def test_cancelled_while_it_waits_while_it_is_read_and_while_it_answers() -> None:
    bench = Bench(2)
    answering, reading, waiting = bench.add([1, 2], n=99), bench.add(range(40)), bench.add([3])
    bench.step()
    for sequence in (answering, reading, waiting):
        sequence.request.cancellation.set()
    later = bench.add([4, 5])
    bench.finish(answering, reading, waiting, later)
    assert answering.finish_reason == "cancelled"
    assert answering.pieces  # it keeps its text
    for sequence in (reading, waiting):
        assert (sequence.finish_reason, type(sequence.error)) == ("error", CancelledError)
    assert later.answer == alone([4, 5])


@pytest.mark.parametrize(("weight", "n_computed"), [(0.0, 1), (1.0, 4)])
def test_the_base_answers_what_it_was_weighed_by_from_the_last_row_on(weight, n_computed) -> None:
    bench = Bench(1, is_exact=True)
    sequence = bench.add(range(1, 11), heard=Heard(0), n_base=6)
    while sequence.state is not State.WEIGHED:
        bench.step()
    bench.weigh(sequence, weight)
    ((span,),) = bench.step()
    assert len(span.tokens) == n_computed
    bench.finish(sequence)
    assert sequence.answer == alone(range(1, 11), weight, n_base=6)


def test_what_the_base_reads_is_one_chunk_and_shared_token_by_token_where_that_is_exact() -> None:
    bench = Bench(2, is_exact=True)
    first = bench.add(range(1, 9), heard=Heard(4), n_base=5)
    ((read,),) = bench.step()
    assert list(read.tokens) == [*range(1, 9)]  # CHUNKS would end after six tokens of these
    bench.weigh(first, 1.0)
    bench.finish(first)
    second = bench.add([1, 2, 3, 4, 8, 8, 8], n_base=5)
    bench.step()
    assert second.n_cached == 4
    bench.finish(second)
    assert second.answer == alone([1, 2, 3, 4, 8, 8, 8], n_base=5)


class CountedJob:
    def __init__(self, n: int, contexts: str = "probe") -> None:
        self.n_left, self.contexts = n, contexts
        self.cancellation = Cancellation()

    @property
    def is_done(self) -> bool:
        return self.n_left == 0

    is_cancelled = False
    is_begun = False


def test_jobs_and_prefill_take_turns_and_decoding_stops_for_neither() -> None:
    scheduler = Scheduler(2, CHUNKS)
    decoding = RunningSequence(request([1]), Noting(), 99)
    scheduler.waiting.append(decoding)
    scheduler.step()
    decoding.n_past = 1
    reading = RunningSequence(request(range(64)), Noting(), 5)
    scheduler.waiting.append(reading)
    job = CountedJob(4)
    scheduler.jobs.append(job)
    seen = ""
    while not job.is_done:
        step = scheduler.step()
        assert step.decode == [decoding]
        assert (step.job is None) != (not step.prefill)
        seen += "j" if step.job else "p"
        if step.job:
            job.n_left -= 1
        for sequence, n in step.prefill:
            sequence.n_past += n
    assert "jj" not in seen
    assert "pp" not in seen


def follow(scheduler: Scheduler, n: int, long_ms: float) -> list[RunningSequence | None]:
    """Run steps, of which a long prompt's takes long_ms; give the first that each prefilled."""
    firsts: list[RunningSequence | None] = []
    for _ in range(n):
        step = scheduler.step()
        for sequence, n_token in step.prefill:
            sequence.n_past += n_token
        firsts.append(step.prefill[0][0] if step.prefill else None)
        is_long = any(sequence.n_prompt > 8 for sequence, _ in step.prefill)
        scheduler.note(step, long_ms if is_long else 1.0)
    return firsts


def test_a_long_prompt_leaves_others_as_much_time_as_it_takes() -> None:
    scheduler = Scheduler(4, CHUNKS)
    long, *short = (RunningSequence(request([n] * n), Noting(), 5) for n in (90, 7, 6, 2))
    scheduler.waiting.append(long)
    assert follow(scheduler, 1, 4.0) == [long]
    scheduler.waiting.extend(short)
    prefilled = [short[0], short[1], None, None, long, None, None, None, None, long]
    assert follow(scheduler, 10, 4.0) == prefilled
    for sequence in short[1:]:
        sequence.finish("stop")
    short[0].listener = Heard(0)  # it waits for its weights
    scheduler.remove_ended()
    assert scheduler.step().is_empty
    short[0].finish("stop")
    scheduler.remove_ended()
    assert scheduler.step().prefill  # nobody else is here


def test_of_long_prompts_the_first_and_the_shortest_take_turns() -> None:
    scheduler = Scheduler(3, CHUNKS)
    first, *others = (RunningSequence(request([n] * n), Noting(), 5) for n in (90, 30, 20))
    scheduler.waiting.extend([first, *others])
    assert follow(scheduler, 4, 4.0) == [first, others[1], first, others[1]]


def test_a_short_request_waits_for_one_chunk_however_many_prompts_are_long() -> None:
    """From its arrival until it has weights and its prompt is prefilled."""
    for n_long in (1, 2, 3):
        scheduler = Scheduler(5, CHUNKS)
        lengths = (98, 59, 40)[:n_long]
        long = [RunningSequence(request([n] * n), Noting(), 5) for n in lengths]
        scheduler.waiting.extend(long)
        short = RunningSequence(request([7] * 6, n_base=4), Noting(), 1, 0, Heard(0))
        for n_before in range(n_long + 1):
            follow(scheduler, n_before, 12.0)
            scheduler.waiting.append(short)
            prefilled = follow(scheduler, 4, 12.0)
            assert sum(each in long for each in prefilled) <= 1
            scheduler.resume(short)
            prefilled = follow(scheduler, 1, 12.0)
            assert prefilled == [short]
            short.finish("stop")
            scheduler.remove_ended()
            short = RunningSequence(request([7] * 6, n_base=4), Noting(), 1, 0, Heard(0))


def test_a_job_waits_for_one_chunk_of_a_long_prompt() -> None:
    scheduler = Scheduler(2, CHUNKS)
    scheduler.waiting.append(RunningSequence(request(range(1, 99)), Noting(), 5))
    follow(scheduler, 1, 12.0)
    scheduler.jobs.append(CountedJob(4))
    assert follow(scheduler, 4, 12.0) == [None] * 4


def test_a_prompt_that_is_prefilled_stays_in_its_slot() -> None:
    """Else the states that nobody has read yet would be in two slots."""
    bench = Bench(3)
    bench.add([1, 2], n=9)
    between = bench.add([3, 4], n=1)
    long = bench.add([5] * 40)
    bench.finish(between)
    bench.step()
    assert (between.slot, long.slot, long.state) == (None, 2, State.PREFILL)


def test_who_weighs_is_woken_before_a_long_prompt_goes_on(monkeypatch) -> None:
    bench = Bench(2)
    decode = bench.context.decode_spans
    order = []

    def slow(spans: Sequence[Span]) -> list[int]:
        order.append(spans[0].seq)
        time.sleep(0.2 * (spans[0].seq == 0))
        return decode(spans)

    monkeypatch.setattr(bench.context, "decode_spans", slow)
    long = bench.add([1] * 60)
    thread = threading.Thread(target=bench.loop.run_forever)
    thread.start()
    wait_until(lambda: long.n_past > 0)
    heard = bench.add([2] * 5, heard=Heard(0))
    bench.loop.drive(lambda: heard.state is State.WEIGHED)
    bench.weigh(heard, 1.0)
    bench.finish(heard)
    bench.loop.close()
    thread.join()
    first = order.index(1)
    assert order[first : first + 2] == [1, 1]


def test_one_that_waits_for_a_prompt_lets_others_pass() -> None:
    bench = Bench(3)
    document = [1] * 40
    bench.add(document)
    bench.step()
    waiting = bench.add([*document, 2, 3])
    other = bench.add([5, 6, 7])
    bench.step()
    assert (waiting.slot, other.n_past) == (None, 3)
    bench.finish(waiting)
    assert waiting.n_cached == 36


def test_a_long_job_lets_one_of_other_contexts_pass() -> None:
    scheduler = Scheduler(1, CHUNKS)
    jobs = [CountedJob(9, "score"), CountedJob(2), CountedJob(2)]
    for job in jobs:
        scheduler.jobs.append(job)
    seen = []
    while any(not job.is_done for job in jobs):
        chosen = scheduler.step().job
        chosen.n_left -= 1
        seen.append(jobs.index(chosen))
        scheduler.remove_ended()
    assert seen == [0, 1, 0, 1, 0, 2, 0, 2, 0, 0, 0, 0, 0]


def request(tokens: Sequence[int], **more: Any) -> Request:
    return Request(tuple(tokens), np.ones((1, 2), np.float32), **more)


def test_rows_are_decoded_in_the_order_of_adjacent_slots() -> None:
    """llama.cpp computes each run of ascending, adjacent sequences apart from the others."""
    n_together = 0
    for seed in range(30):
        rng = random.Random(seed)
        bench = Bench(8)
        for _ in range(60):
            for _ in range(rng.choice([0, 0, 0, 1, 4])):
                prompt = [rng.randrange(9)] * rng.randint(1, 4)
                bench.add(prompt, n=rng.randint(1, 12))
            if not bench.scheduler.has_work:
                continue
            # who waits, or is read, moves later; what is read costs more than a run too many
            is_decoding = not bench.scheduler.waiting and not any(
                sequence.state is State.PREFILL for sequence in bench.scheduler.running
            )
            batches = [[span.seq for span in spans] for spans in bench.step()]
            assert all(rows == sorted(set(rows)) for rows in batches)
            if is_decoding and batches:
                (rows,) = batches
                assert rows == list(range(rows[0], rows[-1] + 1))
                n_together += len(rows) > 1
    assert n_together > 100


def test_decoded_tokens_are_never_reused() -> None:
    bench = Bench(2)
    first = bench.add([1, 2, 3], n=4)
    bench.finish(first)
    turn = [1, 2, 3, *first.answer, 9, 9]
    second = bench.add(turn)
    bench.step()
    assert bench.context.batches[0][0].start == 0
    bench.finish(second)
    assert second.answer == alone(turn)


@pytest.mark.slow
def test_many_random_schedules(monkeypatch) -> None:
    """Whatever comes when, each answer is the one it is alone. And the test would notice if not."""
    assert wrong_answers(seeds=range(100)) == 0

    def forgets_the_weights(slot: Slot, sequence: RunningSequence, *_: Any, **__: Any) -> int:
        tokens = sequence.request.tokens
        n_same = 0
        for held, token in zip(slot.tokens, tokens[:-1], strict=False):
            if held != token:
                break
            n_same += 1
        return n_same

    monkeypatch.setattr(Slot, "n_reused", forgets_the_weights)
    assert any(wrong_answers(seeds=[seed]) for seed in range(60))


def wrong_answers(seeds: Sequence[int]) -> int:
    """Random arrivals, lengths, weights, turns and cancels; how many answers differ from alone."""
    n_wrong = 0
    for seed in seeds:
        rng = random.Random(seed)
        n_slot = rng.randint(1, 5)
        bench = Bench(n_slot + rng.randint(0, 1), n_slot)
        done: list[RunningSequence] = []
        running: list[RunningSequence] = []
        weighed: dict[RunningSequence, float] = {}
        for _ in range(rng.randint(3, 12)):
            prompt = [rng.randrange(3) for _ in range(rng.randint(1, 20))]
            if rng.random() < 0.3:  # what many begin with
                prompt = [*([1, 2] * 5), *prompt]
            if done and rng.random() < 0.5:  # a next turn of somebody's
                last = rng.choice(done)
                prompt = [*last.request.tokens, *last.answer, *prompt]
            n = rng.randint(0, 9)
            weight, n_tail = rng.choice([0.0, 1.0, 2.0]), rng.choice([1, 4, 4, len(prompt)])
            n_base = max(0, len(prompt) - n_tail)
            heard = Heard(rng.randrange(len(prompt))) if n_base and rng.random() < 0.5 else None
            sequence = bench.add(prompt, weight, n, heard, n_base=n_base)
            running.append(sequence)
            if heard:
                weighed[sequence] = weight
            for _ in range(rng.randrange(8)):
                if bench.scheduler.has_work:
                    bench.step()
                if rng.random() < 0.5:
                    n_wrong += answer_weighed(bench, weighed)
            if rng.random() < 0.2:
                rng.choice(running).request.cancellation.set()
            done += [each for each in running if each.finish_reason in ("length", "stop")]
        while not all(each.is_done for each in running):
            n_wrong += answer_weighed(bench, weighed)
            bench.step()
        for each in running:
            weight, n_base = float(each.request.weights[0, 0]), each.request.n_base
            expected = alone(each.request.tokens, weight, each.n_max, n_base=n_base)
            is_cut = each.finish_reason in ("cancelled", "error")
            n_wrong += each.answer != (expected[: len(each.answer)] if is_cut else expected)
    return n_wrong


def answer_weighed(bench: Bench, weighed: dict[RunningSequence, float]) -> int:
    """Let those go on that were weighed; how many were not given what they listen to."""
    n_wrong = 0
    for sequence in [each for each in weighed if each.state is State.WEIGHED]:
        heard, tokens = sequence.listener, sequence.request.tokens
        nothing = np.zeros((1, 2), np.float32).tobytes()
        needed = range(heard.start, len(tokens))
        n_wrong += [heard.cells.get(i) for i in needed] != [(tokens[i], nothing) for i in needed]
        bench.weigh(sequence, weighed.pop(sequence))
    return n_wrong
