"""Scoring: log-probabilities of continuations, many in one batch."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from qaflora_edge.arrays import F32, F64
from qaflora_edge.backend.batch import Span
from qaflora_edge.backend.branches import N_BRANCH, N_OUTPUT, Branches, Steps, prefill
from qaflora_edge.backend.context import Context, KvState
from qaflora_edge.inference.sampler import no_numbers
from qaflora_edge.inference.sequence import Request, log_softmax, surprise

Tokens = tuple[int, ...]
Item = tuple[Request, Tokens]  # a prompt with its weights, and a continuation


class _Continuation(NamedTuple):
    tokens: Tokens
    logprobs: F32  # [n_token] in nats, once they are known


class _Row(NamedTuple):
    """Name a token that predicts the next one: its sequence, and its index in the continuation."""

    seq: int
    at: int


class Scorer:
    """Compute log-probabilities of continuations in branches of their prompt, under its weights."""

    def __init__(self, branches: Branches) -> None:
        self._branches = branches
        self.remembered: dict[Any, F64] = {}  # of decisions: what choices have after no question

    def score(
        self, items: Sequence[Item], read: Callable[[], KvState | None] = lambda: None
    ) -> Steps[list[F32]]:
        """Give log-probabilities in nats of each item's continuation: float32 [n_token] each.

        read  gives the base's KV state of the prompt, where all have one and it is known

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
        for request, continuations in by_request.items():
            for at in range(0, len(continuations), N_BRANCH):
                group = continuations[at : at + N_BRANCH]
                yield from self._score_group(request, group, read())
        return results

    def behind(
        self,
        request: Request,
        continuations: Sequence[Tokens],
        weights: Sequence[F32],
        read: Callable[[], KvState | None],
    ) -> Steps[list[F32]]:
        """Score continuations under weights of their own, all behind what the base reads.

        request  what the base reads
        weights  of each continuation: float32 [n_adapter, n_layer], at most N_BRANCH
        read     gives the base's KV state of a prompt that begins so, where it is known
        returns  log-probabilities in nats of each continuation's tokens from the second on:
                 float32 [n_token - 1] each

        Yields between micro-batches. Raises BackendError when one is NaN.
        """
        n_read = len(request.tokens)
        group = [
            _Continuation(tokens, np.zeros(len(tokens), np.float32)) for tokens in continuations
        ]
        with self._branches.context(n_read + sum(map(len, continuations)), read()) as context:
            context.set_weights(request.weights)
            n_held = context.keep(n_read, 0)
            if n_held < n_read:
                yield from prefill(context, request.tokens, n_held, "none")
            rows = []
            for seq, continuation in enumerate(group, start=1):
                rows += _branch(context, continuation, weights[seq - 1], seq)
            for at in range(0, len(rows), N_OUTPUT):
                _score_rows(context, request, group, rows[at : at + N_OUTPUT])
                yield None
        _check_numbers(group)
        return [continuation.logprobs[1:] for continuation in group]

    def _score_group(
        self, request: Request, group: Sequence[_Continuation], state: KvState | None
    ) -> Steps[None]:
        """Score some continuations of a prompt."""
        n_token = len(request.tokens) + sum(len(continuation.tokens) for continuation in group)
        with self._branches.context(n_token, state) as context:
            yield from _prefill_prompt(context, request)
            after_prompt = log_softmax(context.logits_view())  # [n_vocab]
            rows = []
            for seq, continuation in enumerate(group, start=1):
                continuation.logprobs[0] = after_prompt[continuation.tokens[0]]
                rows += _branch(context, continuation, request.weights, seq)
            for at in range(0, len(rows), N_OUTPUT):
                _score_rows(context, request, group, rows[at : at + N_OUTPUT])
                yield None
            _check_numbers(group)


def _check_numbers(group: Sequence[_Continuation]) -> None:
    for continuation in group:
        if np.isnan(continuation.logprobs).any():
            raise no_numbers("The log-probabilities of a continuation")


def _prefill_prompt(context: Context, request: Request) -> Steps[None]:
    """Prefill a prompt in sequence 0: what the base reads of it, and the rest under the mix."""
    n_base = request.n_base
    read = partial(prefill, context, request.tokens, n_tail=request.n_tail)
    n_held = context.keep(n_base, 0)
    if n_held < n_base:
        context.set_weights(request.next_weights(0))
        yield from read(n_held, "none")
        yield None
    context.set_weights(request.weights)
    yield from read(n_base, "last")
    yield None


def _branch(context: Context, continuation: _Continuation, weights: F32, seq: int) -> list[_Row]:
    """Give a continuation a sequence, where it needs one; give the rows that score its tokens."""
    n_row = len(continuation.tokens) - 1
    if n_row > 0:
        context.copy(0, seq)
        context.set_weights(weights, seq=seq)
    return [_Row(seq, at) for at in range(n_row)]


def _score_rows(
    context: Context, request: Request, group: Sequence[_Continuation], rows: Sequence[_Row]
) -> None:
    """Compute some rows in one batch, and score the token after each of them."""
    n_prompt = len(request.tokens)
    spans = []
    for seq, of_seq in groupby(rows, lambda row: row.seq):
        indices = [row.at for row in of_seq]
        start = indices[0]
        tokens = group[seq - 1].tokens[start : start + len(indices)]
        spans.append(Span(seq, tokens, n_prompt + start, "all"))
    context.decode_spans(spans)
    for output, row in enumerate(rows):
        continuation = group[row.seq - 1]
        next_at = row.at + 1
        next_token = continuation.tokens[next_at]
        continuation.logprobs[next_at] = -surprise(context.logits_view(output), next_token)
