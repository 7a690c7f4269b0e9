"""Where the question stands in a prompt: the last user turn, as the base's template writes it."""

from __future__ import annotations

from collections.abc import Sequence

from qaflora_edge.backend.batch import n_common
from qaflora_edge.backend.model import Model
from qaflora_edge.chat.tokens import chat_tokens
from qaflora_edge.errors import QafloraError

_SAMPLES = ("a", "Some other words.")  # two questions, which a template has to frame alike


class QuestionFinder:
    """What the base's chat template puts before a question, learnt from two short ones.

    Only tokens are looked at, so that prompts are understood however they were made. What people
    type never becomes a control token, and so cannot look like a turn.
    """

    def __init__(self, model: Model) -> None:
        self._control = {token.id for token in model.special_tokens if token.is_control}
        self._head, self._rest = self._opening(model)

    def _opening(self, model: Model) -> tuple[list[int], list[int]]:
        """How a user turn begins, from a control token on: what is sought for, and the white space
        behind it, which may have become one token with the question's first one.
        """
        try:
            one, other = (
                chat_tokens(model, [{"role": "user", "content": text}]) for text in _SAMPLES
            )
        except QafloraError:  # no template, or one that cannot be used
            return [], []
        n = n_common(one, other)
        behind = one[len(one) - n_common(one[::-1], other[::-1]) :]
        end = n
        while end > 0 and not model.piece(one[end - 1], special=True).strip():
            end -= 1
        for start in range(end - 1, -1, -1):
            # Long enough to be no assistant's turn, which may begin with the same token.
            if one[start] in self._control and _last_place(one[start:end], behind) is None:
                return one[start:end], one[end:n]
        return [], []

    def find(self, tokens: Sequence[int]) -> tuple[int, int] | None:
        """Where the last user turn's text begins and ends; None where there is no such turn."""
        at = _last_place(self._head, tokens)
        if at is None:
            return None
        start = at + len(self._head)
        for token in self._rest:
            start += start < len(tokens) and tokens[start] == token
        end = start
        while end < len(tokens) and tokens[end] not in self._control:
            end += 1
        return (start, end) if start < end else None


def _last_place(part: Sequence[int], tokens: Sequence[int]) -> int | None:
    """Where a part that is not empty begins for the last time."""
    places = range(len(tokens) - len(part), -1, -1) if part else ()
    return next((at for at in places if list(tokens[at : at + len(part)]) == list(part)), None)
