"""What is measured of a query with the base alone: one pass, however many adapters there are."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from qaflora_edge.arrays import F32, F64
from qaflora_edge.backend.context_params import default_threads
from qaflora_edge.backend.model import Model, Pack
from qaflora_edge.backend.probe_context import ProbeContext
from qaflora_edge.errors import BackendError
from qaflora_edge.formats.adapter import AdapterInfo
from qaflora_edge.weighing.adapter_inputs import (
    AttentionInputs,
    AttentionSizes,
    QueryProjections,
    sums_of,
)
from qaflora_edge.weighing.prefixes import Prefixes
from qaflora_edge.weighing.reading import (
    Steps,
    closed,
    probe_context,
    read_tokens,
    wiped_on_failure,
)
from qaflora_edge.weighing.strategy import Reading, Span

BASE = "base"  # the key of what it read, in Prefixes


class BaseProber:
    """One sequence of the base.

    files     of the adapters, where they were read before
    prefixes  where what was read of prompts is kept

    The context is made when first needed and replaced by a larger one for a longer query. What a
    query begins with costs norms() and added() nothing where it was read before.

    rows, in all methods: which adapters of the pack are compared, in ascending order.
    """

    def __init__(
        self,
        model: Model,
        pack: Pack,
        options: dict[str, Any],
        *,
        files: Sequence[Path | AdapterInfo] | None = None,
        prefixes: Prefixes | None = None,
    ) -> None:
        self._files = files or pack.paths
        self._model, self._pack, self._options = model, pack, options
        self._prefixes = prefixes or Prefixes(0)
        self.context: ProbeContext | None = None
        self._projections: dict[tuple[int, ...], QueryProjections] = {}
        self._sizes: dict[int, AttentionSizes] = {}
        self._threads = ThreadPoolExecutor(options.get("threads") or default_threads())
        self._readings: dict[Reading, tuple[tuple[int, ...], AttentionInputs]] = {}

    def close(self) -> None:
        self._threads.shutdown(wait=False)
        if self.context is not None:
            self.context.close()
            self.context = None

    def norms(self, tokens: Sequence[int], rows: Sequence[int]) -> Steps[F64]:
        """How much each adapter adds to a late query projection: float64 [n_row].

        |scale B A x| for the last token's x (after LoGo, arXiv 2511.07129).

        Raises StrategyError when the adapters have no query projection in common.
        """
        key = tuple(rows)
        if key not in self._projections:
            files = [self._files[row] for row in rows]
            self._projections = {key: QueryProjections(files, self._model.n_layer)}
        context = self._room_for(tokens, has_inputs=True)
        context.capture_begin()
        n_kept = self._prefixes.go_on(context, BASE, tokens, context.pieces())
        with wiped_on_failure(context):
            yield from read_tokens(context, tokens, n_kept, "last", n_seq=1)
        return self._projections[key].norms(context.inputs(0)[0])

    def embedding(self, tokens: Sequence[int]) -> Steps[F32]:
        """The mean over tokens of the state after the last block: float32 [n_embd]."""
        context = self._room_for(tokens, all_outputs=True)
        context.clear()
        context.capture_begin("mean")
        with wiped_on_failure(context):
            yield from read_tokens(context, tokens, 0, "all", n_seq=1)
            embedding: F32 = context.states(0)[-1]
        if not np.isfinite(embedding).all():
            raise BackendError(
                f"The state after the last block is NaN or infinite with {self._model.path}, "
                "expected finite numbers; fetch or convert it again."
            )
        return embedding

    def routing(
        self, tokens: Sequence[int], rows: Sequence[int], reading: Reading
    ) -> Steps[tuple[F64, F64]]:
        """Arrow's or SpectR's weights, their mean over tokens and modules, and what they come from.

        returns  two float64 [n_row, n_layer]

        Raises StrategyError when the adapters have no projection of the attention in common.
        """
        held, inputs = self._readings.get(reading, ((), None))
        if inputs is None or held != tuple(rows):
            files = [self._files[row] for row in rows]
            inputs = AttentionInputs(files, self._model.n_layer, reading)
            self._readings[reading] = (tuple(rows), inputs)
        context = self._room_for(tokens, has_inputs=True, all_outputs=True)
        context.clear()
        sums = np.zeros((2, len(rows), self._model.n_layer))
        with wiped_on_failure(context):
            at = 0
            while at < len(tokens):
                piece = tokens[at : context.pieces().end(tokens, at)]
                context.capture_begin("mean")
                context.decode(piece, start=at, outputs="all")
                sums += inputs.sums(context.inputs(0, n_row=len(piece)))
                at += len(piece)
                yield at
        weights, sizes = sums / len(tokens)
        return weights, sizes

    def added(self, tokens: Sequence[int], rows: Sequence[int], span: Span) -> Steps[F64]:
        """How much each adapter would add to q, k and v in two places: [2, n_row, n_layer].

        |scale B A x| with x as the base alone reads it, the geometric mean over a layer's modules:
        at the last token, and in the mean over the question's tokens, which stand at span. 0 where
        an adapter adapts none of them.
        """
        for row in rows:
            if row not in self._sizes:
                self._sizes[row] = AttentionSizes(self._files[row], self._model.n_layer)
        sizes = [self._sizes[row] for row in rows]
        start, stop = span
        context = self._room_for(tokens, has_inputs=True, all_outputs=True)
        question: list[F64] = [np.zeros(1) for _ in rows]
        with wiped_on_failure(context):
            at = self._read_before(context, tokens, start)
            while at < len(tokens):
                end = context.pieces().end(tokens, at)
                context.capture_begin("mean")
                context.decode(tokens[at:end], start=at, outputs="all")
                inputs = context.inputs(0, n_row=end - at)
                inside = inputs[max(start - at, 0) : max(stop - at, 0)]
                found = sums_of(sizes, inside, self._threads)
                question = [q + more for q, more in zip(question, found, strict=True)]
                at = end
                yield at
        n = stop - start
        at_last = sums_of(sizes, inputs[-1:], self._threads)
        last = [each.of_layers(q) for q, each in zip(at_last, sizes, strict=True)]
        means = [each.of_layers(q / n) for q, each in zip(question, sizes, strict=True)]
        return np.array([last, means])

    def _read_before(self, context: ProbeContext, tokens: Sequence[int], n_most: int) -> int:
        """How many tokens need not be read again: up to a cut, n_most at most."""
        pieces, cut = context.pieces(), 0
        n_kept = self._prefixes.go_on(context, BASE, tokens, pieces)
        while (end := pieces.end(tokens, cut)) <= min(n_kept, n_most):
            cut = end
        return n_kept if n_kept == cut else context.keep_common(tokens[: cut + 1])

    def _room_for(
        self, tokens: Sequence[int], *, has_inputs: bool = False, all_outputs: bool = False
    ) -> ProbeContext:
        """A context for a query, which captures what was asked for now or before and no more."""
        held = self.context
        if held is not None:
            has_inputs = has_inputs or held.has_inputs
            all_outputs = all_outputs or held.all_outputs
        asked = (has_inputs, all_outputs)
        if held is None or held.n_ctx < len(tokens) or asked != (held.has_inputs, held.all_outputs):
            state, self.context = closed(held), None
            self.context = probe_context(
                self._model,
                self._pack,
                self._options,
                max(len(tokens), 0 if held is None else held.n_ctx),
                n_seq=1,
                has_inputs=has_inputs,
                all_outputs=all_outputs,
            )
            if state is not None:
                self.context.load_kv_state(state)
        assert self.context is not None
        return self.context
