"""Scoring: log-probabilities of continuations, many in one batch."""

from collections.abc import Sequence
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np

from qaflora_edge.arrays import F32, F64
from qaflora_edge.backend.batch import Outputs, Span
from qaflora_edge.backend.context import Context
from qaflora_edge.backend.model import Model, Pack
from qaflora_edge.backend.prefix import GrowingContext, Steps, wiped_on_failure
from qaflora_edge.inference.sampler import no_numbers
from qaflora_edge.inference.sequence import Request, log_softmax

Tokens = tuple[int, ...]
Item = tuple[Request, Tokens]  # a prompt with its weights, and a continuation
Scored = tuple[Tokens, F32]  # a continuation, and its log-probabilities once they are known
_N_SEQ = 32  # continuations of one prompt in a batch, the prompt itself included
_N_OUTPUT = 64  # rows of logits in a batch: their memory is n_vocab each


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
        groups: dict[Request, list[Scored]] = {}
        for request, continuation in items:
            result = np.zeros(len(continuation), np.float32)
            results.append(result)
            if continuation:
                groups.setdefault(request, []).append((continuation, result))
        n_together = _N_SEQ - 1
        for request, members in groups.items():
            for at in range(0, len(members), n_together):
                part = members[at : at + n_together]
                n_token = len(request.tokens) + sum(len(tokens) for tokens, _ in part)
                context = self._contexts.for_query(n_token)
                with wiped_on_failure(context):
                    yield from _score_group(context, request, part)
                    if any(np.isnan(result).any() for _, result in part):
                        raise no_numbers("The log-probabilities of a continuation")
                context.clear()
        return results


def prefill_request(context: Context, request: Request, n_token: int) -> Steps[int]:
    """Prefill a request's prompt in sequence 0, from what is held there up to n_token tokens.

    returns  the row of the last token, whose logits are there if it is the prompt's last
    """
    row = -1
    at = len(context.tokens[0])
    while at < n_token:
        end = min(n_token, request.chunk_end(context.chunks(), at))
        outputs: Outputs = "last" if end == len(request.tokens) else "none"
        context.set_weights(request.next_weights(at))
        (row,) = context.decode_spans([Span(0, request.tokens[at:end], at, outputs)])
        at = end
        yield None
    return row


def _score_group(context: Context, request: Request, part: Sequence[Scored]) -> Steps[None]:
    n_prompt = len(request.tokens)
    last_row = yield from prefill_request(context, request, n_prompt)
    first = log_softmax(context.logits_view(last_row))  # [n_vocab]
    unread = []  # sequence and place of each token that predicts another
    for seq, (tokens, result) in enumerate(part, 1):
        result[0] = first[tokens[0]]
        if len(tokens) > 1:
            context.copy(0, seq)
            context.set_weights(request.weights, seq=seq)
            unread += [(seq, at) for at in range(len(tokens) - 1)]
    for n_done in range(0, len(unread), _N_OUTPUT):
        batch = unread[n_done : n_done + _N_OUTPUT]
        spans = []
        for seq, group in groupby(batch, itemgetter(0)):
            places = [at for _, at in group]
            tokens, _ = part[seq - 1]
            piece = tokens[places[0] : places[-1] + 1]
            spans.append(Span(seq, piece, n_prompt + places[0], "all"))
        context.decode_spans(spans)
        for row, (seq, at) in enumerate(batch):
            tokens, result = part[seq - 1]
            log_p = log_softmax(context.logits_view(row))  # [n_vocab]
            result[at + 1] = log_p[tokens[at + 1]]
        yield None
