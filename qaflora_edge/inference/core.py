"""The core: a base with its adapters and contexts, and the loop that computes for all callers.

Token ids, weights and samplers go in; text, texts' bytes and strategies are the Engine's matter.
"""

import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import Any, TypeVar

import numpy as np

from qaflora_edge.arrays import F32
from qaflora_edge.backend.context import Context
from qaflora_edge.backend.model import Pack, shared_model
from qaflora_edge.backend.stop import Stop
from qaflora_edge.errors import QafloraError
from qaflora_edge.formats.adapter import AdapterInfo
from qaflora_edge.formats.gguf import GgufHeader
from qaflora_edge.inference.generation import Generation
from qaflora_edge.inference.lifetime import Lifetime
from qaflora_edge.inference.loop import Loop
from qaflora_edge.inference.request import Cancellation, Request, Sampling
from qaflora_edge.inference.sampler import Sampler
from qaflora_edge.inference.scheduler import Scheduler
from qaflora_edge.inference.score import Item, Scorer
from qaflora_edge.inference.sequence import Sequence as RunningSequence
from qaflora_edge.progress import Tell, silent
from qaflora_edge.weighing.numbers import FusionWeights
from qaflora_edge.weighing.prefix_cache import Prefixes
from qaflora_edge.weighing.probe import Prober, QueryProbe, Steps
from qaflora_edge.weighing.strategy import Query

T = TypeVar("T")


class Core:
    """What an Engine computes with; freed by its lifetime.

    adapters    name -> adapter GGUF, checked, in the order of every first axis
    n_ctx       tokens of prompt and answer together, of each request
    n_parallel  requests that are decoded together
    placing     gpu_layers, rpc and tensor_split: where the base's layers go
    adapter_type  of config.ADAPTER_TYPES
    prefix_cache  MiB for what the probe read of prompts
    options     threads, kv_type and flash_attn of every context
    """

    def __init__(
        self,
        lifetime: Lifetime,
        base: GgufHeader,
        adapters: Mapping[str, AdapterInfo],
        *,
        n_ctx: int,
        n_parallel: int,
        placing: Mapping[str, Any],
        adapter_type: str,
        prefix_cache: int,
        options: Mapping[str, Any],
    ) -> None:
        self.lifetime, self.n_ctx, self.n_parallel = lifetime, n_ctx, n_parallel
        self.adapters = tuple(adapters)
        keep, stop = lifetime.keep, Stop()
        self.model = keep(shared_model(base.path, placing, base))
        paths = [info.path for info in adapters.values()]
        self.pack = keep(Pack(self.model, paths, adapter_type=adapter_type))
        more: dict[str, Any] = {**options, "stop": stop}
        self.context = keep(Context(self.model, self.pack, n_ctx=n_ctx, n_seq=n_parallel, **more))
        self.adapter_bytes = [info.path.stat().st_size for info in adapters.values()]
        files = list(adapters.values())
        prefixes = Prefixes(prefix_cache << 20)
        self.prober = keep(Prober(self.model, self.pack, more, infos=files, prefixes=prefixes))
        self._scorer = keep(Scorer(self.model, self.pack, more))
        self.model.check_workers()
        scheduler = Scheduler(n_parallel, self.context.pieces())
        self._loop = Loop(self.model, self.context, scheduler, stop)
        self._cancellations: weakref.WeakSet[Cancellation] = weakref.WeakSet()
        self._cancelling = threading.RLock()  # of a set that all threads change
        self.last_answer: int | None = None  # number of the last request's sequence

    def close(self) -> None:
        """Free everything; calls of other threads that go on end with BusyError."""
        self.lifetime.close(end_calls=self._loop.close)

    def run_forever(self) -> None:
        """See Loop.run_forever."""
        self._loop.run_forever()

    # ending calls early

    def cancellation(self, event: threading.Event | None = None) -> Cancellation:
        """What ends one call: cancel() does, and so does an event that its caller sets."""
        cancellation = Cancellation(event)
        with self._cancelling:
            self._cancellations.add(cancellation)
        return cancellation

    def cancel(self) -> None:
        """End all that is computed or waits; any thread may call it, and it returns at once."""
        with self._cancelling:
            for cancellation in list(self._cancellations):
                cancellation.set()
        self._loop.stop_if_cancelled()

    # before the answer

    def rows(self, names: Iterable[str]) -> list[int]:
        """Where adapters stand among all that are loaded."""
        return [self.adapters.index(name) for name in names]

    def probe(
        self, cancellation: Cancellation, tell: Tell | None = None
    ) -> Callable[[Query], QueryProbe]:
        """Measure a query for a strategy, with other callers' work in between."""
        return partial(self._query_probe, cancellation, tell)

    def _query_probe(
        self,
        cancellation: Cancellation,
        tell: Tell | None,
        query: Query,
    ) -> QueryProbe:
        def run(steps: Steps[T], /) -> T:
            told = steps if tell is None else self._telling(steps, tell, len(query.tokens))
            result: T = self._loop.run("probe", told, cancellation)
            return result

        return QueryProbe(self.prober, query, self.rows(query.adapters), run)

    def _telling(self, steps: Steps[T], tell: Tell, n_token: int) -> Steps[T]:
        """The same steps, whose progress is told."""
        with closing(steps):
            while True:
                try:
                    n_read = next(steps)
                except StopIteration as end:
                    result: T = end.value
                    return result
                if n_read is not None:
                    with self.lifetime.telling():
                        tell("weighing", n_read, n_token)
                yield n_read

    def all_weights(self, fusion: FusionWeights) -> F32:
        """float32 [n_adapter, n_layer] of all loaded adapters, 0 for those not in use."""
        weights = np.zeros((len(self.adapters), self.model.n_layer), np.float32)
        weights[self.rows(fusion.adapters)] = fusion.weights
        return weights

    def logits(
        self, tokens: Sequence[int], fusion: FusionWeights, cancellation: Cancellation
    ) -> F32:
        """float32 [n_vocab] after a prompt that is read under weights."""
        request = Request(
            tuple(tokens),
            self.all_weights(fusion),
            adapters=fusion.adapters,
            keeps_logits=True,
            cancellation=cancellation,
        )
        sequence = RunningSequence(request, None, 0)
        self._loop.add(sequence)
        self._loop.drive(lambda: sequence.is_done)
        if sequence.error is not None:
            raise sequence.error
        assert sequence.logits is not None
        return sequence.logits

    def run(self, steps: Steps[T]) -> T:
        """What a generator returns, others' work in between."""
        result: T = self._loop.run("probe", steps, self.cancellation())
        return result

    def score(self, items: Sequence[Item], cancellation: Cancellation) -> list[F32]:
        """Log-probabilities in nats of each item's continuation: float32 [n_token] each."""
        scores: list[F32] = self._loop.run("score", self._scorer.score(items), cancellation)
        return scores

    # answers

    def sampler(self, sampling: Sampling) -> Sampler:
        """What chooses an answer's tokens. Raises GrammarError as it does."""
        return Sampler(self.model, sampling)

    def begin(
        self,
        request: Request,
        sampler: Sampler,
        fusion: FusionWeights,
    ) -> Generation:
        """Put a request into the queue."""
        n_room = self.n_ctx - len(request.tokens) + 1
        most = request.sampling.max_tokens
        n_max = n_room if most is None else min(n_room, most)
        sequence = RunningSequence(request, sampler, n_max)
        self.last_answer = sequence.number
        self._loop.add(sequence)
        return self._generation(sequence, fusion)

    def failed(self, error: QafloraError) -> Generation:
        """An answer that failed before its request was made."""
        nothing = np.zeros((0, self.model.n_layer), np.float32)
        sequence = RunningSequence(Request((), nothing), None, 0)
        sequence.fail(error)
        return self._generation(sequence, FusionWeights((), nothing))

    def _generation(self, sequence: RunningSequence, fusion: FusionWeights) -> Generation:
        return Generation(sequence, fusion, drive=self._loop.drive, call=self.lifetime.call)

    def wait_for_prompt(self, answer: Generation, tell: Tell | None = None) -> None:
        """Compute until an answer's prompt was read.

        Raises what went wrong before its first token.
        """
        sequence = answer._sequence

        def n_read() -> int:
            return min(sequence.n_past, sequence.n_prompt)  # it may be answered already

        def is_read() -> bool:
            return sequence.is_done or not sequence.is_prefill

        def has_more() -> bool:
            return is_read() or n_read() > n_told

        tell, n_told = tell or silent, 0
        while not is_read():
            tell("reading", n_told, sequence.n_prompt)
            self._loop.drive(has_more)
            n_told = n_read()
        tell("reading", n_read(), sequence.n_prompt)
        if sequence.error is not None and not sequence.answer:
            raise sequence.error

    def wait_for_any(self, answers: Iterable[Generation]) -> None:
        """Compute until one of some answers is done."""
        sequences = [answer._sequence for answer in answers]
        self._loop.drive(lambda: any(sequence.is_done for sequence in sequences))
