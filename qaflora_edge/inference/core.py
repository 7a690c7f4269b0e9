"""The core: an Engine's calls, and the loop that computes for them.

Token ids, weights and samplers go in. Texts and strategies are the Engine's matter.
"""

import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import numpy as np

from qaflora_edge.arrays import F32, F64
from qaflora_edge.ask import Sampling
from qaflora_edge.backend.context import (
    N_CTX_FIRST,
    N_OUTPUT,
    Context,
    KvState,
    Stop,
    n_ctx_for,
    trim,
)
from qaflora_edge.backend.model import Pack, shared_model
from qaflora_edge.errors import BusyError, OptionError, QafloraError
from qaflora_edge.formats.gguf import GgufHeader
from qaflora_edge.formats.inputs import FileState, check_unchanged
from qaflora_edge.inference.generation import Generation, follow
from qaflora_edge.inference.guesses import Guesser
from qaflora_edge.inference.loop import Loop
from qaflora_edge.inference.sampler import Sampler
from qaflora_edge.inference.scheduler import Scheduler
from qaflora_edge.inference.sequence import (
    Cancellation,
    Request,
    RunningSequence,
    Written,
    surprise,
)
from qaflora_edge.progress import Tell, silent
from qaflora_edge.weighing.drafted import ANSWER, BASE, DRAFT_TOKENS, N_TOGETHER, Draft
from qaflora_edge.weighing.numbers import FusionWeights, alone_weights, n_base_of
from qaflora_edge.weighing.strategy import Measure, Query, Reading

if TYPE_CHECKING:
    from qaflora_edge.backend.prefix import Steps
    from qaflora_edge.formats.adapter import AdapterInfo
    from qaflora_edge.inference.drafts import Drafter, Shown
    from qaflora_edge.inference.score import Scorer
    from qaflora_edge.weighing.adapter_inputs import AttentionSizes
    from qaflora_edge.weighing.probe import Listener

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
        draft: int | str,
        placing: Mapping[str, Any],
        prefix_cache: int,
        sizes: Callable[[], Sequence["AttentionSizes"]],
        **options: Any,
    ) -> None:
        self.adapters = tuple(adapters)
        self.options = options
        self.is_closed = False
        self._idle = threading.Condition()
        self._n_call: dict[int, int] = {}  # by thread
        self._cancellations: weakref.WeakSet[Cancellation] = weakref.WeakSet()
        self._cancelling = threading.RLock()  # all threads change that set
        stop = Stop()
        options["stop"] = stop
        resources = ExitStack()  # which is closed from the last to the first
        self._resources = resources
        enter = resources.enter_context
        resources.callback(trim)
        weakref.finalize(self, resources.close).atexit = False
        infos = [*adapters.values()]
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
            self.draft = self._drafts(draft)
            check_unchanged(states)  # llama.cpp opened the files by name, after the checks
            from qaflora_edge.backend.prefix import Prefixes
            from qaflora_edge.weighing.probe import Prober

            # Of contexts whose KV states go from one to the other: with flash, or all without.
            self._alike = dict(options)
            if model.is_on_cpu:
                self._alike["flash_attn"] = not context.is_flash_off
            prober = Prober(
                model,
                self.pack,
                options,
                alike=self._alike,
                infos=infos,
                sizes=sizes(),
                prefixes=Prefixes(prefix_cache << 20),
            )
            self.prober = enter(closing(prober))
            # Nothing here refers to this Core: a circle would keep it alive.
            chunks = replace(context.chunks(), is_exact=self._is_exact)
            scheduler = Scheduler(n_parallel + 1, chunks, n_parallel)
            self.loop = enter(closing(Loop(model, context, scheduler, stop)))
        except BaseException:
            resources.close()
            raise

    @cached_property
    def scorer(self) -> "Scorer":
        """Score continuations; the first call makes it."""
        from qaflora_edge.inference.score import Scorer

        scorer = Scorer(self.model, self.pack, self.options)
        self._resources.callback(scorer.close)
        return scorer

    @cached_property
    def drafter(self) -> "Drafter":
        """Decode drafts; only a strategy that reads some makes it."""
        from qaflora_edge.inference.drafts import Drafter

        drafter = Drafter(self.model, self.pack, self._alike)
        self._resources.callback(drafter.close)
        return drafter

    def _drafts(self, asked: int | str) -> int | None:
        """Give the most tokens of a guess, 0 for none, None for as many as pay.

        Where nothing is asked for, none are guessed that would change an answer's rounding.
        """
        can_forget = not self.model.n_swa and not self.model.is_recurrent
        if asked == "auto":
            return None if can_forget and self._is_exact else 0
        if asked and not can_forget:
            raise OptionError(
                f"Option draft is {asked}, expected 0: the base {self.model.name} has states that "
                "cannot forget a wrong guess."
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

    def all_weights(self, names: Iterable[str], weights: F32) -> F32:
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
        tell: Callable[[int], None] | None = None,
        *,
        kind: str = "probe",
    ) -> T:
        """Drive a generator to its end, with other callers' work in between; tell its yields."""
        result: T = self.loop.run(kind, steps, cancellation or self.cancellation(), tell)
        return result

    def begin(
        self,
        request: Request,
        sampler: Sampler | None,
        *,
        begun: Sequence[int] = (),
        weighed: RunningSequence | None = None,
        written: Written | None = None,
    ) -> RunningSequence:
        """Put a request into the queue, or go on with its prompt that was weighed.

        begun    tokens with which its answer probably begins
        written  what it begins with, where the likeliest tokens are chosen, behind that prompt
        """
        n_prompt = len(request.tokens)
        most = request.sampling.max_tokens
        n_ctx = self.n_ctx_for(n_prompt, most) if weighed is None else weighed.n_ctx
        n_room = n_ctx - n_prompt + 1
        n_max = n_room if most is None else min(n_room, most)
        if weighed is None:
            sequence = RunningSequence(request, sampler, n_max, n_ctx)
        else:
            sequence = weighed
            sequence.start(request, sampler, n_max)
            is_plain = sampler is not None and sampler.is_plain and sampler.constraint is None
            state = None if written is None else written.state
            has_room = state is not None and len(state.tokens) < n_ctx
            if is_plain and n_max > 0 and has_room and not request.sampling.logprobs:
                sequence.written = written
                begun = ()
        if self.draft != 0:
            # As if it had been answered before: what was drafted is verified, not decoded.
            before = (*request.tokens, *begun, *request.tokens) if begun else request.tokens
            sequence.guesser = Guesser(before, self.draft)
        if weighed is None:
            self.loop.add(sequence)
        else:
            self.loop.resume(sequence)
        return sequence

    def generation(self, sequence: RunningSequence, fusion: FusionWeights) -> Generation:
        """Give an answer to its caller."""
        return Generation(sequence, fusion, drive=self.loop.drive, call=self.call)

    def relayed(
        self,
        tokens: Sequence[int],
        fusion: FusionWeights,
        cancellation: Cancellation,
        weighed: RunningSequence | None,
        written: Written | None,
        answer: Callable[[FusionWeights], RunningSequence],
    ) -> Generation:
        """Let the knower of a relay draft, and then the writer answer.

        tokens  of the prompt without the draft
        weighed, written  as begin() takes them
        answer  begins the writer's answer, once `fusion` has the draft
        """
        from qaflora_edge.inference.drafts import finished_draft

        relay = fusion.relay
        assert relay is not None
        sampling = Sampling(max_tokens=DRAFT_TOKENS, logprobs=0)
        request = Request(
            tuple(tokens),
            self.weights_of(relay.knower),
            sampling,
            (relay.knower,),
            n_base_of(len(tokens)),
            cancellation=cancellation,
        )
        sampler = Sampler(self.model, sampling)
        begun = relay.draft.tokens
        drafting = self.begin(request, sampler, begun=begun, weighed=weighed, written=written)

        def go_on() -> tuple[RunningSequence, FusionWeights]:
            draft = finished_draft(self.model, drafting, relay.knower)
            draft_ms = drafting.timings.prefill_ms + drafting.timings.decode_ms
            is_drafted = drafting.error is None and not cancellation.is_set
            relayed = replace(relay, draft=draft, is_drafted=is_drafted, draft_ms=draft_ms)
            drafted = replace(fusion, relay=relayed)
            if is_drafted:
                sequence = answer(drafted)
                sequence.is_told = True
                return sequence, drafted
            ended = RunningSequence(replace(request, sampling=Sampling()), None, 0)
            if drafting.error is not None:
                ended.fail(drafting.error)
            ended.finish("cancelled")
            return ended, drafted

        return Generation(drafting, fusion, drive=self.loop.drive, call=self.call, go_on=go_on)

    def n_ctx_for(self, n_prompt: int, n_answer: int | None) -> int:
        """Size a slot for a prompt and an answer; None: without a limit."""
        if n_answer is None:
            n_answer = _N_ANSWER
        return min(self.n_ctx, max(self._n_first, n_ctx_for(n_prompt + n_answer)))

    def failed(self, error: QafloraError) -> Generation:
        """Make an answer that failed before its request was made."""
        nothing = np.zeros((0, self.model.n_layer), np.float32)
        sequence = RunningSequence(Request((), nothing), None, 0)
        sequence.fail(error)
        return self.generation(sequence, FusionWeights((), nothing))


class Probes:
    """Measure queries for one call of an Engine, one after the other: see strategy.Probe.

    tell      called with "weighing", how many tokens are done, and how many there are
    n_answer  tokens of the answer that the base's prefill goes on to; None: no limit
    on_draft  called with the text so far of what is answered unless drafts decide otherwise
    query     attribute: what is measured
    weighed   attribute: the last query's sequence, whose slot is kept for begin(), or until end()
    """

    def __init__(
        self,
        core: Core,
        cancellation: Cancellation,
        tell: Tell = silent,
        n_answer: int | None = 0,
        on_draft: Callable[[str], Any] = silent,
    ) -> None:
        self._core = core
        self._cancellation = cancellation
        self._tell = tell
        self._n_answer = n_answer
        self._on_draft = on_draft
        self.weighed: RunningSequence | None = None
        self._written: dict[str, Written] = {}
        self._heard: Listener | None = None  # of the query, once a listener has it

    def __call__(self, query: Query) -> Self:
        """Measure this query from now on; the slot of the one before is free."""
        self.end()
        self.query = query
        self._written = {}
        self._heard = None
        self._rows = self._core.rows(query.adapters)
        self._tokens = query.tokens[: query.n_weighed]
        return self

    def divergence(self, measure: Measure = "kl") -> F64:
        query = self.query
        measured = partial(self._core.prober.divergence, self._tokens, self._rows, measure)
        return self._run(measured(query.lens, query.pool, query.question))

    def states(self) -> F32:
        query = self.query
        steps = self._core.prober.states(self._tokens, self._rows, query.pool, query.question)
        return np.array(self._run(steps))

    def embedding(self) -> F32:
        return np.array(self._run(self._core.prober.mean_states(self._tokens))[-1])

    def added(self) -> F64:
        query = self.query
        n_scored = N_OUTPUT * query.is_chat
        end = len(self._tokens)
        listener = self._core.prober.added(self._rows, query.question, end, n_scored)
        return np.array(self._listen(listener))

    def neutral(self) -> F64:
        steps = self._core.prober.neutral(self.query, self._rows, self._read_again)
        return np.array(self._core.run(steps, self._cancellation))

    def surprise(self) -> float:
        return self._after_added().nats

    def question(self) -> str:
        start, end = self.query.question
        data = self._core.model.detokenize(self.query.tokens[start:end])
        return data.decode("utf-8", "replace")

    def unexpected(self, token: int) -> float:
        next_logits = self._after_added().next_logits
        assert next_logits is not None
        return surprise(next_logits, token)

    def _after_added(self) -> "Listener":
        if self._heard is None:
            self.added()
        assert self._heard is not None
        return self._heard

    def routing(self, reading: Reading) -> tuple[F64, F64]:
        found: tuple[F64, F64] = self._listen(self._core.prober.routing(self._rows, reading))
        return found

    def norms(self) -> F64:
        n_token = len(self._tokens)
        return np.array(self._listen(self._core.prober.norms(self._rows, n_token)))

    def _run(self, steps: "Steps[T]") -> T:
        n_token = len(self.query.tokens)
        return self._core.run(
            steps, self._cancellation, lambda n_done: self._tell("weighing", n_done, n_token)
        )

    def _listen(self, listener: "Listener") -> Any:
        self.end()
        self._heard = listener
        core = self._core
        tokens = self.query.tokens
        nothing = np.zeros((len(core.adapters), core.model.n_layer), np.float32)
        n_base = n_base_of(len(tokens))
        request = Request(tokens, nothing, n_base=n_base, cancellation=self._cancellation)
        n_ctx = core.n_ctx_for(len(tokens), self._n_answer)
        sequence = RunningSequence(request, None, 0, n_ctx, listener)
        core.loop.add(sequence)
        try:
            follow(core.loop.drive, sequence, partial(self._tell, "weighing"))
        except BaseException:
            self._cancellation.set()
            core.loop.drive(lambda: sequence.is_done)
            raise
        if sequence.error is not None:
            raise sequence.error
        self.weighed = sequence
        return listener.result()

    def drafts(
        self, names: Iterable[str], n_token: int, answer: F32 | None = None
    ) -> "list[Draft]":
        from qaflora_edge.inference.drafts import Shown

        names = list(names)
        core = self._core
        asked = {name: core.weights_of(name) for name in names}
        answering = None  # whose draft the answer begins with, if these stay the weights
        if answer is not None:
            weights = core.all_weights(self.query.adapters, answer)
            answering = ANSWER if weights.any() else BASE
            for name, other in asked.items():
                if (weights == other).all():
                    answering = name
                    break
            asked[answering] = weights
        missing = {
            name: weights
            for name, weights in asked.items()
            if name not in self._written or not self._written[name].draft.has(n_token)
        }
        tokens = self.query.tokens
        request = Request(tokens, core.weights_of(BASE), n_base=n_base_of(len(tokens)))
        after_prompt = None if self._heard is None else self._heard.next_logits
        left = sorted(missing, key=lambda name: name != answering)
        for at in range(0, len(left), N_TOGETHER):
            together = {name: missing[name] for name in left[at : at + N_TOGETHER]}
            shown = Shown()
            steps = core.drafter.draft(
                request, together, self._written, n_token, self._read_again, after_prompt, shown
            )
            tell = partial(self._show, shown) if left[at] == answering else None
            for written in core.run(steps, self._cancellation, tell, kind="draft"):
                self._written[written.draft.adapter] = written
        return [self._written[name].draft for name in names]

    def _show(self, shown: "Shown", n_token: int) -> None:
        from qaflora_edge.inference.drafts import text_of

        self._on_draft(text_of(self._core.model, shown.tokens[:n_token]))

    def written(self, weights: F32) -> Written | None:
        """Give the draft under these weights, with which an answer begins, if there is one.

        weights  [n_adapter, n_layer] of the query's adapters
        """
        wanted = self._core.all_weights(self.query.adapters, weights)
        for written in self._written.values():
            if written.state is not None and (written.weights == wanted).all():
                return written
        return None

    def _read_again(self) -> KvState | None:
        if self.weighed is None or self.weighed.slot is None:
            return None
        return self._core.context.kv_state_of(self.weighed.slot)

    def end(self) -> None:
        """Free the slot that is kept."""
        if self.weighed is not None:
            self._core.loop.end(self.weighed)
            self.weighed = None


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
