"""The loop: scheduler and runner, driven by waiting callers in turn, or by one thread for all."""

import threading
import time
from collections.abc import Callable, Generator, Sequence
from enum import Enum, auto
from typing import Any

from qaflora_edge.backend.context import Context, cancelled
from qaflora_edge.backend.library import Stop
from qaflora_edge.backend.model import Model
from qaflora_edge.errors import BackendError, BusyError, QafloraError
from qaflora_edge.inference.runner import Runner
from qaflora_edge.inference.scheduler import Job, Scheduler
from qaflora_edge.inference.sequence import Cancellation, RunningSequence, State
from qaflora_edge.progress import TellDone, silent

_POLL_S = 0.1  # for an event of a caller that cancels
_PAUSE_S = 0.005
_UNUSED_S = 300.0  # after which memory that no request has needed is given back


class Computing:
    """Count the loops of this process that compute a step now: they share its cores."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._n = 0

    def add(self, n: int) -> int:
        """Add to the number, and give it."""
        with self._lock:
            self._n += n
            return self._n


COMPUTING = Computing()


class Driver(Enum):
    """Name who computes: nobody now, a caller that waits, or the thread in run_forever."""

    NOBODY = auto()
    CALLER = auto()
    SERVER = auto()


class Loop:
    """Let one thread at a time drive; the others wait for what concerns them.

    stop  ends native work of the contexts that watch it

    Without run_forever the waiting callers drive, one at a time.
    """

    def __init__(
        self, vocabulary: Model, context: Context, scheduler: Scheduler, stop: Stop
    ) -> None:
        self._scheduler = scheduler
        self._stop = stop
        self._runner = Runner(vocabulary, context, self._computing)
        self._context = context
        self._n_ctx_first = context.n_ctx
        self._large_s = 0.0  # when a request last needed more
        self._turn = threading.Condition()
        self._driver = Driver.NOBODY
        self._is_closed = False
        self._closed = BusyError("This Engine was closed in the middle of a call.")
        self._is_left = False  # by the thread in run_forever, for good
        self._now: Sequence[RunningSequence | Job] = ()  # who waits for the native call

    def add(self, sequence: RunningSequence) -> None:
        with self._turn:
            self._scheduler.waiting.append(sequence)
            self._turn.notify_all()

    def resume(self, sequence: RunningSequence) -> None:
        """Go on with a sequence that was weighed and has its weights now."""
        with self._turn:
            if not sequence.is_done:
                self._scheduler.resume(sequence)
            self._turn.notify_all()

    def end(self, sequence: RunningSequence) -> None:
        """End a sequence that was weighed, and free its slot."""
        with self._turn:
            sequence.finish("stop")
            self._scheduler.remove_ended()
            self._turn.notify_all()

    def run(
        self,
        contexts: str,
        steps: Generator[int | None, None, Any],
        cancellation: Cancellation,
        tell: TellDone = silent,
    ) -> Any:
        """Drive a generator to its end, with other work in between; give its result.

        contexts  what it computes in: those of the same contexts run one after the other
        tell  called by this thread, between steps, with the last number that was yielded
        """
        job = Job(contexts, steps, cancellation)
        with self._turn:
            self._scheduler.jobs.append(job)
            self._turn.notify_all()
        n_told = 0

        def has_more() -> bool:
            return job.is_done or job.n_done > n_told

        try:
            while not job.is_done:
                self.drive(has_more)
                if job.n_done > n_told:
                    n_told = job.n_done
                    tell(n_told)
        except BaseException:
            cancellation.set()
            self.drive(lambda: job.is_done)
            raise
        if job.error is not None:
            raise job.error
        return job.result

    def drive(self, is_ready: Callable[[], bool]) -> None:
        """Compute, or wait for the thread that does, until something is ready."""
        with self._turn:
            while not is_ready():
                if self._driver is not Driver.NOBODY:
                    self._turn.wait()
                    continue
                if not self._scheduler.has_work and not self._is_closed:
                    self._turn.wait(_POLL_S)  # for the weights of a prompt
                    continue
                self._driver = Driver.CALLER
                try:
                    self._step()
                finally:
                    self._driver = Driver.NOBODY
                    self._turn.notify_all()

    def follow(self, sequence: RunningSequence, tell: Callable[[int, int], Any]) -> None:
        """Compute until a prompt is prefilled; tell how many tokens are done, and those in all."""
        n_told = 0

        def n_read() -> int:
            return min(sequence.n_past, sequence.n_prompt)  # it may be answered already

        def is_read() -> bool:
            return sequence.is_done or sequence.n_past >= sequence.n_prompt

        def has_more() -> bool:
            return is_read() or n_read() > n_told

        while not is_read():
            tell(n_told, sequence.n_prompt)
            self.drive(has_more)
            n_told = n_read()
        tell(n_read(), sequence.n_prompt)

    def run_forever(self) -> None:
        """Compute whatever is asked for, until close() or leave(); other threads only wait.

        Waiting callers wake when the next step computes, so their work on pieces delays none.

        Raises what a step failed with, as do all callers that waited; it may be called again then.
        """
        with self._turn:
            self._wait_for_driver()
            self._driver = Driver.SERVER
            try:
                while not (self._is_closed or self._is_left):
                    if self._scheduler.has_work:
                        self._step()
                    else:
                        self._turn.notify_all()
                        self._turn.wait(_UNUSED_S)
                        self._shrink_unused()
            except BaseException as error:  # Ctrl-C in the middle of a step too
                failed = BackendError("A step of the Engine failed; its cause says how.")
                failed.__cause__ = error
                self._end_all(failed)
                raise
            finally:
                self._driver = Driver.NOBODY
                self._turn.notify_all()

    def stop_if_cancelled(self) -> None:
        """End the running native call, if all callers that wait for it were cancelled."""
        with self._turn:
            if self._now and all(waiter.is_cancelled for waiter in self._now):
                self._stop.set()

    def leave(self) -> None:
        """End run_forever: those who wait compute from now on."""
        with self._turn:
            self._is_left = True
            self._turn.notify_all()

    def close(self) -> None:
        """End all that waits or runs with BusyError."""
        with self._turn:
            self._is_closed = True
            self._stop.set()
            self._turn.notify_all()
            self._wait_for_driver()
            self._end_all(self._closed)
            self._turn.notify_all()

    def _wait_for_driver(self) -> None:
        while self._driver is not Driver.NOBODY:
            self._turn.wait()

    def _step(self) -> None:
        """Decide and compute one step; called with the lock, which is free during computation."""
        self._end_cancelled()
        self._scheduler.remove_ended()
        if not self._scheduler.has_work:
            return
        self._shrink_unused()
        step = self._scheduler.step()
        running = self._scheduler.running
        prefilled = [s for s in running if s.state is State.PREFILL and s.listener is None]
        decoded = step.decode
        self._turn.release()
        start = time.perf_counter()
        n_computing = COMPUTING.add(1)
        try:
            self._runner.run(step, self._scheduler.slots)
            if step.job is not None:
                self._computing([step.job])
                step.job.advance()
        except BaseException:
            self._runner.forget(self._scheduler.slots)
            if self._driver is not Driver.SERVER:
                for sequence in self._scheduler.running:
                    sequence.fail(cancelled())
            raise
        finally:
            ms = 1e3 * (time.perf_counter() - start)
            n_mean = (n_computing + COMPUTING.add(-1) + 1) / 2
            step.count(1e-3 * ms / n_mean)
            self._turn.acquire()
            self._now = ()
        if step.is_empty:
            self._turn.notify_all()  # one of them weighs the prompt that all wait for
            self._turn.wait(_PAUSE_S)
        self._scheduler.note(step, 1e3 * (time.perf_counter() - start))
        for sequence in prefilled:
            sequence.timings.prefill_ms += ms
        for sequence in decoded:
            sequence.timings.decode_ms += ms
        self._end_cancelled()
        self._scheduler.remove_ended()

    def _shrink_unused(self) -> None:
        n_first = self._n_ctx_first
        running = self._scheduler.running
        now = time.monotonic()
        asking = (*self._scheduler.waiting, *running)
        if any(sequence.n_ctx > n_first for sequence in asking):
            self._large_s = now
        is_unused = self._context.n_ctx > n_first and now - self._large_s >= _UNUSED_S
        if is_unused and not running:
            self._runner.shrink(n_first, self._scheduler.slots)

    def _computing(self, waiting: Sequence[RunningSequence | Job]) -> None:
        with self._turn:
            self._now = waiting
            if not self._is_closed:
                self._stop.clear()
            if self._driver is Driver.SERVER:
                self._turn.notify_all()

    def _end_cancelled(self) -> None:
        for sequence in (*self._scheduler.waiting, *self._scheduler.running):
            if sequence.is_cancelled and not sequence.is_done:
                if sequence.is_told or sequence.state is State.DECODE:
                    sequence.finish("cancelled")
                else:
                    sequence.fail(cancelled())
        for job in self._scheduler.jobs:
            if job.is_cancelled and not job.is_done:
                job.fail(cancelled())
        if self._is_closed:
            self._end_all(self._closed)

    def _end_all(self, error: QafloraError) -> None:
        for sequence in (*self._scheduler.waiting, *self._scheduler.running):
            sequence.fail(error)
        for job in self._scheduler.jobs:
            if not job.is_done:
                job.fail(error)
        self._scheduler.remove_ended()
