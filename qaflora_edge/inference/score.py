"""Scoring: log-probabilities of continuations, many in one batch."""

from collections.abc import Sequence
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from qaflora_edge.arrays import F32, F64
from qaflora_edge.backend.batch import Span
from qaflora_edge.backend.context import Context
from qaflora_edge.backend.model import Model, Pack
from qaflora_edge.backend.prefix import GrowingContext, Steps, prefill, wiped_on_failure
from qaflora_edge.inference.sampler import no_numbers
from qaflora_edge.inference.sequence import Request, log_softmax

Tokens = tuple[int, ...]
Item = tuple[Request, Tokens]  # a prompt with its weights, and a continuation
_N_SEQ = 32  # continuations of one prompt in a batch, the prompt itself included
_N_OUTPUT = 64  # rows of logits in a batch: their memory is n_vocab each


class _Continuation(NamedTuple):
    tokens: Tokens
    logprobs: F32  # [n_token] in nats, once they are known


class _Row(NamedTuple):
    """Name a token that predicts the next one: its sequence, and its place in the continuation."""

    seq: int
    place: int


class Scorer:
    """Compute log-probabilities in a context that the first continuation opens.

    Continuations of one request, a prompt with its weights, share its KV state.
    """

    def __init__(self, model: Model, pack: Pack, options: dict[str, Any]) -> None:
        make = partial(Context, model, pack, n_seq=_N_SEQ, n_output=_N_OUTPUT, is_unified=True)
        self._contexts = GrowingContext(partial(make, **options))
        self.close = self._contexts.close
        self.remembered: dict[Any, F64] = {}  # of decisions: what choices have after no question

    def score(self, items: Sequence[Item]) -> Steps[list[F32]]:
        """Give log-probabilities in nats of each item's continuation: float32 [n_token] each.

        Yields between micro-batches. Raises BackendError when one is NaN.
        """
        results = []
        by_request: dict[Request, list[_Continuation]] = {}
        for request, tokens in items:
            logprobs = np.zeros(len(tokens), np.float32)
            results.append(logprobs)
            if tokens:
                continuations = by_request.setdefault(request, [])
                continuations.append(_Continuation(tokens, logprobs))
        n_together = _N_SEQ - 1
        for request, continuations in by_request.items():
            for at in range(0, len(continuations), n_together):
                yield from self._score_group(request, continuations[at : at + n_together])
        return results

    def _score_group(self, request: Request, group: Sequence[_Continuation]) -> Steps[None]:
        """Score some continuations of a prompt, and leave the context empty."""
        n_token = len(request.tokens) + sum(len(continuation.tokens) for continuation in group)
        context = self._contexts.for_query(n_token)
        with wiped_on_failure(context):
            yield from _prefill_prompt(context, request)
            rows = _branch(context, request, group)
            for at in range(0, len(rows), _N_OUTPUT):
                _score_rows(context, request, group, rows[at : at + _N_OUTPUT])
                yield None
            for continuation in group:
                if np.isnan(continuation.logprobs).any():
                    raise no_numbers("The log-probabilities of a continuation")
        context.clear()


def _prefill_prompt(context: Context, request: Request) -> Steps[None]:
    """Prefill a prompt in sequence 0: what the base reads of it, and the rest under the mix."""
    n_base = request.n_base
    read = partial(prefill, context, request.tokens, n_tail=request.n_tail)
    if n_base:
        context.set_weights(request.next_weights(0))
        yield from read(0, "none")
        yield None
    context.set_weights(request.weights)
    yield from read(n_base, "last")
    yield None


def _branch(context: Context, request: Request, group: Sequence[_Continuation]) -> list[_Row]:
    """Score first tokens, after the prompt; give the rows that score others, each in a sequence."""
    after_prompt = log_softmax(context.logits_view())  # [n_vocab]
    rows = []
    for seq, continuation in enumerate(group, start=1):
        first_token = continuation.tokens[0]
        continuation.logprobs[0] = after_prompt[first_token]
        n_row = len(continuation.tokens) - 1
        if n_row:
            context.copy(0, seq)
            context.set_weights(request.weights, seq=seq)
        for place in range(n_row):
            rows.append(_Row(seq, place))
    return rows


def _score_rows(
    context: Context, request: Request, group: Sequence[_Continuation], rows: Sequence[_Row]
) -> None:
    """Compute some rows in one batch, and score the token after each of them."""
    n_prompt = len(request.tokens)
    spans = []
    for seq, of_seq in groupby(rows, lambda row: row.seq):
        places = [row.place for row in of_seq]
        start = places[0]
        tokens = group[seq - 1].tokens[start : start + len(places)]
        spans.append(Span(seq, tokens, n_prompt + start, "all"))
    context.decode_spans(spans)
    for output, row in enumerate(rows):
        continuation = group[row.seq - 1]
        next_place = row.place + 1
        next_token = continuation.tokens[next_place]
        logprobs = log_softmax(context.logits_view(output))  # [n_vocab]
        continuation.logprobs[next_place] = logprobs[next_token]
