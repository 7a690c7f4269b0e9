"""Scoring: log-probabilities of continuations, many in one batch."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qaflora_edge.arrays import F32
from qaflora_edge.backend.batch import Outputs, Span
from qaflora_edge.backend.context import Context, n_ctx_for
from qaflora_edge.backend.model import Model, Pack
from qaflora_edge.inference.request import Request
from qaflora_edge.inference.sampler import no_numbers
from qaflora_edge.inference.sequence import log_softmax
from qaflora_edge.weighing.probe import wiped_on_failure

_N_SEQ = 32  # continuations of one prompt in a batch, the prompt itself included
_N_OUTPUT = 64  # rows of logits in a batch: their memory is n_vocab each


@dataclass(frozen=True, eq=False)
class Item:
    """Hold token ids of a prompt and its continuation, and weights: see request.Request."""

    prompt: tuple[int, ...]
    continuation: tuple[int, ...]
    weights: F32
    n_base: int = 0


class Scorer:
    """Compute log-probabilities in a context that the first continuation opens.

    Continuations of one prompt under the same weights share its KV state.
    """

    def __init__(self, model: Model, pack: Pack, options: dict[str, Any]) -> None:
        self._model, self._pack, self._options = model, pack, options
        self._context: Context | None = None

    def close(self) -> None:
        """Free the context."""
        if self._context is not None:
            self._context.close()
            self._context = None

    def score(self, items: Sequence[Item]) -> Generator[None, None, list[F32]]:
        """Give log-probabilities in nats of each item's continuation: float32 [n_token] each.

        Yields between micro-batches. Raises BackendError when one is NaN.
        """
        results = [np.zeros(len(item.continuation), np.float32) for item in items]
        groups: dict[tuple[tuple[int, ...], bytes, int], list[int]] = {}
        for i, item in enumerate(items):
            if item.continuation:
                key = item.prompt, item.weights.tobytes(), item.n_base
                groups.setdefault(key, []).append(i)
        for (prompt, *_), members in groups.items():
            for at in range(0, len(members), _N_SEQ - 1):
                part = [(items[i], results[i]) for i in members[at : at + _N_SEQ - 1]]
                context = self._room_for(prompt, [item for item, _ in part])
                with wiped_on_failure(context):
                    yield from _score_group(context, prompt, part)
                    if any(np.isnan(result).any() for _, result in part):
                        raise no_numbers("The log-probabilities of a continuation")
                context.clear()
        return results

    def _room_for(self, prompt: Sequence[int], items: Sequence[Item]) -> Context:
        n_token = len(prompt) + sum(len(item.continuation) for item in items)
        if self._context is None or self._context.n_ctx < n_token:
            self.close()
            self._context = Context(
                self._model,
                self._pack,
                n_ctx=n_ctx_for(n_token),
                n_seq=_N_SEQ,
                n_output=_N_OUTPUT,
                is_unified=True,
                **self._options,
            )
        return self._context


def _score_group(
    context: Context, prompt: Sequence[int], part: Sequence[tuple[Item, F32]]
) -> Generator[None, None, None]:
    """Prefill the prompt once, then all continuations after it."""
    weights = part[0][0].weights
    request, at, rows = Request(tuple(prompt), weights, n_base=part[0][0].n_base), 0, [-1]
    while at < len(prompt):
        end = request.chunk_end(context.chunks(), at)
        outputs: Outputs = "last" if end == len(prompt) else "none"
        context.set_weights(request.next_weights(at))
        rows = context.decode_spans([Span(0, prompt[at:end], at, outputs)])
        at = end
        yield
    first = log_softmax(context.logits_view(rows[0]))
    for item, result in part:
        result[0] = first[item.continuation[0]]
    longer = [(seq, *pair) for seq, pair in enumerate(part, 1) if len(pair[0].continuation) > 1]
    for seq, _, _ in longer:
        context.copy(0, seq)
        context.set_weights(weights, seq=seq)
    for batch in _batches([(seq, len(item.continuation) - 1) for seq, item, _ in longer]):
        spans = [
            Span(seq, part[seq - 1][0].continuation[at : at + n], len(prompt) + at, "all")
            for seq, at, n in batch
        ]
        rows = context.decode_spans(spans)
        for (seq, at, n), last in zip(batch, rows, strict=True):
            item, result = part[seq - 1]
            for i in range(n):
                log_p = log_softmax(context.logits_view(last + 1 - n + i))
                result[at + i + 1] = log_p[item.continuation[at + i + 1]]
        yield


def _batches(lengths: Sequence[tuple[int, int]]) -> Generator[list[tuple[int, int, int]]]:
    """Cut (sequence, tokens) into batches of (sequence, from, tokens), _N_OUTPUT tokens at most."""
    batch: list[tuple[int, int, int]] = []
    n_free = _N_OUTPUT
    for seq, length in lengths:
        at = 0
        while at < length:
            n = min(n_free, length - at)
            batch.append((seq, at, n))
            at, n_free = at + n, n_free - n
            if n_free == 0:
                yield batch
                batch, n_free = [], _N_OUTPUT
    if batch:
        yield batch
