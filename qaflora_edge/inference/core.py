"""The core: an Engine's calls, and the loop that computes for them.

Token ids, weights and samplers go in. Texts and strategies are the Engine's matter.
"""

import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from qaflora_edge.arrays import F32, ArrayLike
from qaflora_edge.backend.context import N_CTX_FIRST, N_OUTPUT, Context, n_ctx_for
from qaflora_edge.backend.library import Stop, glibc
from qaflora_edge.backend.model import Pack, shared_model
from qaflora_edge.errors import BusyError, OptionError
from qaflora_edge.formats.gguf import GgufHeader
from qaflora_edge.formats.inputs import FileState, check_unchanged
from qaflora_edge.inference.guesses import Guesser
from qaflora_edge.inference.loop import Loop
from qaflora_edge.inference.sampler import Sampler
from qaflora_edge.inference.scheduler import Scheduler
from qaflora_edge.inference.sequence import Cancellation, DraftState, Request, RunningSequence
from qaflora_edge.progress import TellDone, silent
from qaflora_edge.weighing.plan import alone_weights

if TYPE_CHECKING:
    from qaflora_edge.backend.branches import Steps
    from qaflora_edge.formats.adapter import AdapterInfo
    from qaflora_edge.inference.drafts import Drafter
    from qaflora_edge.inference.score import Scorer
    from qaflora_edge.weighing.adapter_inputs import AttentionSizes
    from qaflora_edge.weighing.examples import Examples
    from qaflora_edge.weighing.published.prober import Prober

T = TypeVar("T")
_N_ANSWER = 2048  # tokens that an answer without a limit has at least, where the context has them
_process: int | None = None  # in which the library computed first


class Core:
    """Open a base, its adapters, and contexts made of them; run the calls of an Engine.

    base      header from formats.base.read_base
    adapters  name -> facts of its file, in the order of every first axis
    states    of the files when they were checked
    placing   gpu_layers, rpc and tensor_split: where the base's layers go
    sizes     gives those of each adapter that are read meanwhile, or none
    options   threads, kv_type and flash_attn of every context; `options` has `stop` as well

    The other keywords are Engine's. Raises ChecksumError for a file that changed since,
    BackendError, GgufFileError, WorkerError.

    close() frees all, contexts before their model. Without it the garbage collector does.
    """

    def __init__(
        self,
        base: GgufHeader,
        adapters: "Mapping[str, AdapterInfo]",
        states: Mapping[Path, FileState],
        *,
        n_ctx: int | None,
        n_parallel: int,
        adapter_type: str,
        guesses: int | str,
        placing: Mapping[str, Any],
        sizes: Callable[[], Sequence["AttentionSizes"]],
        **options: Any,
    ) -> None:
        self.adapters = tuple(adapters)
        self.options = options
        self.is_closed = False
        self.examples: Callable[[], Examples | None] = lambda: None  # what was taught by now
        self._idle = threading.Condition()
        self._n_call: dict[int, int] = {}  # by thread
        self._cancellations: weakref.WeakSet[Cancellation] = weakref.WeakSet()
        self._cancelling = threading.RLock()  # all threads change that set
        stop = Stop()
        options["stop"] = stop
        resources = ExitStack()  # which is closed from the last to the first
        self._resources = resources
        enter = resources.enter_context
        resources.callback(glibc, "malloc_trim", 0)  # small blocks, freed in many threads
        weakref.finalize(self, resources.close).atexit = False
        infos = [*adapters.values()]
        self._infos = infos
        try:
            model = enter(shared_model(base, placing))
            self.model = model
            paths = [info.path for info in infos]
            self.pack = enter(Pack(model, paths, adapter_type=adapter_type))
            if n_ctx is None:
                from qaflora_edge.backend.devices import automatic_ctx

                self.n_ctx = automatic_ctx(model, base, options["kv_type"], n_parallel)
            else:
                self.n_ctx = n_ctx
            self._n_first = n_ctx or min(self.n_ctx, N_CTX_FIRST)
            # One more than answers: the base's KV state of a prompt that the mix prefills.
            shape: Any = {"n_ctx": self._n_first, "n_seq": n_parallel + 1}
            # Rows that are scored, and the last one behind them.
            shape["n_output"] = max(n_parallel, N_OUTPUT) + 1
            context = enter(Context(model, self.pack, **shape, **options))
            self.context = context
            has_alike = self.pack.n_alike >= N_OUTPUT and not model.is_recurrent
            self._is_exact = context.is_flash_off and has_alike  # see Chunks
            self.n_guess = self._n_guess(guesses)
            check_unchanged(states)  # llama.cpp opened the files by name, after the checks
            from qaflora_edge.backend.branches import Branches
            from qaflora_edge.weighing.added import Added

            # Of contexts whose KV states go from one to the other: with flash, or all without.
            alike = dict(options)
            if model.is_on_cpu:
                alike["flash_attn"] = not context.is_flash_off
            self.branches = Branches(model, self.pack, alike)
            enter(closing(self.branches))
            added = Added(self.branches, infos, sizes(), model.n_layer, options["threads"])
            self.added = enter(closing(added))
            # Nothing here refers to this Core: a circle would keep it alive.
            chunks = replace(context.chunks(), is_exact=self._is_exact)
            scheduler = Scheduler(n_parallel + 1, chunks, n_parallel)
            self.loop = enter(closing(Loop(model, context, scheduler, stop)))
        except BaseException:
            resources.close()
            raise

    @cached_property
    def prober(self) -> "Prober":
        """Measure with each adapter alone; only qa-flora and its kin make it."""
        from qaflora_edge.weighing.published.prober import Prober

        prober = Prober(
            self.model,
            self.pack,
            self.options,
            infos=self._infos,
        )
        self._resources.callback(prober.close)
        return prober

    @cached_property
    def scorer(self) -> "Scorer":
        """Score continuations; the first call makes it."""
        from qaflora_edge.inference.score import Scorer

        return Scorer(self.branches)

    @cached_property
    def drafter(self) -> "Drafter":
        """Decode drafts; only a strategy that reads some makes it."""
        from qaflora_edge.inference.drafts import Drafter

        return Drafter(self.model, self.branches)

    def _n_guess(self, asked: int | str) -> int | None:
        """Give the most tokens of a guess, 0 for none, None for as many as pay.

        Where nothing is asked for, none are guessed that would change an answer's rounding.
        """
        can_forget = not self.model.n_swa and not self.model.is_recurrent
        if asked == "auto":
            return None if can_forget and self._is_exact else 0
        if asked and not can_forget:
            raise OptionError(
                f"Option guesses is {asked}, expected 0: the base {self.model.name} has states "
                "that cannot forget a wrong guess."
            )
        return int(asked)

    @contextmanager
    def call(self) -> Iterator[None]:
        """Keep the resources open. Raises BusyError after close() or a fork."""
        global _process
        check_process()
        me = threading.get_ident()
        with self._idle:
            if self.is_closed:
                raise BusyError("This Engine is closed; make a new one.")
            self._n_call[me] = self._n_call.get(me, 0) + 1
        _process = os.getpid()
        try:
            yield
        finally:
            with self._idle:
                self._n_call[me] -= 1
                if not self._n_call[me]:
                    del self._n_call[me]
                    self._idle.notify_all()

    def close(self) -> None:
        """Free everything once no call uses it. A second call does nothing.

        Calls of other threads end with BusyError. A forked process leaves all to its parent.

        Raises BusyError within a call of the same thread, such as on_weights.
        """
        if _process not in (None, os.getpid()):
            self.is_closed = True
            return
        me = threading.get_ident()
        with self._idle:
            if me in self._n_call:
                raise BusyError(
                    "This Engine is in use by the call that close() was called from; close it "
                    "after the call has returned."
                )
            self.is_closed = True
        self.loop.close()
        with self._idle:
            self._idle.wait_for(lambda: not self._n_call)
        self._resources.close()

    def cancellation(self, event: threading.Event | None = None) -> Cancellation:
        """Make what ends one call: cancel() does, and so does an event that its caller sets."""
        cancellation = Cancellation(event)
        with self._cancelling:
            self._cancellations.add(cancellation)
        return cancellation

    def cancel(self) -> None:
        """End all that is computed or waits; any thread may call it, and it returns at once."""
        with self._cancelling:
            for cancellation in list(self._cancellations):
                cancellation.set()
        self.loop.stop_if_cancelled()

    def rows(self, names: Iterable[str]) -> list[int]:
        """Find where adapters stand among all that are loaded."""
        return [self.adapters.index(name) for name in names]

    def all_weights(self, names: Iterable[str], weights: ArrayLike) -> F32:
        """Give float32 [n_adapter, n_layer] of all loaded adapters, 0 for those not in use.

        weights  [n_adapter, n_layer] of these adapters
        """
        every = np.zeros((len(self.adapters), self.model.n_layer), np.float32)
        every[self.rows(names)] = weights
        return every

    def weights_of(self, name: str) -> F32:
        """Give float32 [n_adapter, n_layer] of one adapter at 1, or of BASE."""
        return alone_weights(name, self.adapters, self.model.n_layer)

    def run(
        self,
        steps: "Steps[T]",
        cancellation: Cancellation | None = None,
        tell: TellDone = silent,
        *,
        contexts: str = "probe",
    ) -> T:
        """Drive a generator to its end, with other callers' work in between; tell its yields."""
        result: T = self.loop.run(contexts, steps, cancellation or self.cancellation(), tell)
        return result

    def begin(
        self,
        request: Request,
        sampler: Sampler | None,
        *,
        guesses: Sequence[int] = (),
        resumed: RunningSequence | None = None,
        draft_state: DraftState | None = None,
        is_told: bool = False,
    ) -> RunningSequence:
        """Put a request into the queue, or go on where its prompt was read.

        guesses  tokens with which its answer probably begins
        resumed  the sequence in which the base has read the prompt
        draft_state  what it begins with, where the likeliest tokens are chosen, behind that prompt
        is_told  whether its caller has something of the answer
        """
        n_prompt = len(request.tokens)
        most = request.sampling.max_tokens
        n_ctx = self.n_ctx_for(n_prompt, most) if resumed is None else resumed.n_ctx
        n_room = n_ctx - n_prompt + 1
        n_max = n_room if most is None else min(n_room, most)
        if resumed is None:
            sequence = RunningSequence(request, sampler, n_max, n_ctx)
        else:
            sequence = resumed
            sequence.start(request, sampler, n_max)
            is_plain = sampler is not None and sampler.is_plain and sampler.constraint is None
            state = None if draft_state is None else draft_state.kv_state
            has_room = state is not None and len(state.tokens) < n_ctx
            if is_plain and n_max > 0 and has_room and not request.sampling.logprobs:
                sequence.draft_state = draft_state
                guesses = ()
        sequence.is_told = is_told
        if self.n_guess != 0:
            # As if it had been answered before: what was drafted is verified, not decoded.
            before = (*request.tokens, *guesses, *request.tokens) if guesses else request.tokens
            sequence.guesser = Guesser(before, self.n_guess)
        if resumed is None:
            self.loop.add(sequence)
        else:
            self.loop.resume(sequence)
        return sequence

    def n_ctx_for(self, n_prompt: int, n_answer: int | None) -> int:
        """Size a slot for a prompt and an answer; None: without a limit."""
        if n_answer is None:
            n_answer = _N_ANSWER
        return min(self.n_ctx, max(self._n_first, n_ctx_for(n_prompt + n_answer)))


def check_process() -> None:
    """Raise BusyError in a process that was forked from one in which the library has computed.

    Its threads do not exist after a fork, and the library would wait for them for ever.
    """
    if _process not in (None, os.getpid()):
        raise BusyError(
            f"This process was forked from process {_process}, in which an Engine was in use, and "
            "the library's threads are not here. Start processes with multiprocessing's method "
            "'spawn', or fork before the first Engine is used."
        )
