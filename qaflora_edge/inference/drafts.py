"""Drafts: answers of single adapters, or the base, that a strategy reads before it decides."""

from collections.abc import Iterable
from collections.abc import Sequence as Many

import numpy as np

from qaflora_edge.backend.context import cancelled
from qaflora_edge.backend.model import Model
from qaflora_edge.inference.core import Core
from qaflora_edge.inference.draft import Drafter
from qaflora_edge.inference.request import Cancellation, Request, Sampling
from qaflora_edge.inference.sampler import Sampler
from qaflora_edge.inference.sequence import Sequence
from qaflora_edge.weighing.drafted import BASE, DRAFT_TOKENS, Draft
from qaflora_edge.weighing.numbers import n_base_of
from qaflora_edge.weighing.strategy import Query

_N_FOR_ANSWER = 64  # tokens of the context that a draft leaves to the answer


class Drafts:
    """Let adapters answer one query, each alone: greedy, the base prefills.

    cancellation  of the call; it ends all drafts
    """

    def __init__(self, core: Core, query: Query, cancellation: Cancellation) -> None:
        self._core = core
        self._query = query
        self._cancellation = cancellation
        self._running: dict[str, Sequence] = {}

    def begin(self, names: Iterable[str], n_token: int) -> list[Draft]:
        """Give drafts of n_token tokens, or whole shorter ones, decoded together as slots allow.

        names  of adapters, or BASE; those that have begun are not begun again
        """
        asked = list(names)
        for name in asked:
            if name not in self._running:
                self._running[name] = self._start(name, n_token)
        sequences = [self._running[name] for name in asked]
        self._drive(sequences)
        return [self._draft(name) for name in asked]

    def finish(self, name: str) -> Draft:
        """Finish a draft: it begins again, with what there is of it as guesses."""
        begun = self._running[name]
        self._drive([begun])
        if begun.finish_reason == "length":
            self._running[name] = self._start(name, DRAFT_TOKENS, begun.answer)
            self._drive([self._running[name]])
        return self._draft(name)

    def _drive(self, sequences: list[Sequence]) -> None:
        """Compute until all have ended. Raises CancelledError where the call was cancelled."""
        self._core.loop.drive(lambda: all(each.is_done for each in sequences))
        if self._cancellation.is_set:
            raise cancelled()

    def end(self) -> None:
        """End all, and wait until their slots are free."""
        sequences = list(self._running.values())
        for sequence in sequences:
            sequence.request.cancellation.set()
        self._core.loop.drive(lambda: all(each.is_done for each in sequences))

    def _start(self, name: str, n_max: int, begun: Many[int] = ()) -> Sequence:
        """Put an answer by one adapter, or the base, into the queue, with its logprobs.

        begun  tokens with which it begins: guesses
        """
        core = self._core
        tokens = self._query.tokens
        weights = np.zeros((len(core.adapters), core.model.n_layer), np.float32)
        if name != BASE:
            weights[core.rows([name])] = 1
        sampling = Sampling(max_tokens=n_max, logprobs=0)
        request = Request(
            tokens,
            weights,
            sampling,
            n_base=n_base_of(len(tokens)),
            cancellation=Cancellation(around=self._cancellation),
        )
        n_ctx = core.n_ctx_for(len(tokens), n_max)
        n_max = min(n_max, n_ctx - len(tokens) + 1)
        sequence = Sequence(request, Sampler(core.model, sampling), n_max, n_ctx)
        if core.draft != 0:
            known = (*tokens, *begun, *tokens) if begun else tokens
            sequence.drafter = Drafter(known, core.draft)
        core.loop.add(sequence)
        return sequence

    def _draft(self, name: str) -> Draft:
        """Give a draft as far as it has come. Raises what it failed with."""
        sequence = self._running[name]
        if sequence.error is not None:
            raise sequence.error
        return Draft(
            adapter=name,
            tokens=tuple(sequence.answer),
            text="".join(piece for piece, _, _ in sequence.pieces),
            logprobs=tuple(each.logprob for each in sequence.logprobs),
            is_whole=sequence.finish_reason == "stop",
        )


def with_draft(
    model: Model,
    tokens: Many[int],
    question: tuple[int, int, bool] | None,
    draft: Draft,
    n_ctx: int,
) -> list[int]:
    """Put a draft in parentheses before the question, as if it had been asked so.

    tokens    of the prompt
    question  begin and end of the question in it, as chat.tokens.find_question gives them
    n_ctx     tokens of the context; what it cannot hold is left out at the draft's end

    The question comes last, so that the writer answers in its language. A control token that is
    spelt out in the draft stays text.
    """
    if question is None:
        return [*tokens]
    start, end, _ = question
    n_room = max(0, n_ctx - len(tokens) - _N_FOR_ANSWER)
    said = model.detokenize(draft.tokens[:n_room])
    asked = model.detokenize(tokens[start:end])
    text = b"(%s)\n\n%s" % (said.strip(), asked)
    written = text.decode("utf-8", "replace")
    told = model.tokenize(written, add_special=False, parse_special=False)
    return [*tokens[:start], *told, *tokens[end:]]
