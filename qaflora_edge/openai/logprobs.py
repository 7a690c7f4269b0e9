"""Log-probabilities of an answer's tokens in OpenAI's shapes."""

import codecs
from collections.abc import Sequence
from typing import Any

from qaflora_edge.inference.generation import Generation
from qaflora_edge.inference.logprobs import TokenLogprob


class ShownTokens:
    """Hands out tokens as their text is shown; those of a stop text are never."""

    def __init__(self, generation: Generation) -> None:
        self._generation = generation
        self.is_asked = generation.wants_logprobs
        self._n_token = self._n_byte = self._n_text = 0

    def take(self, text: str) -> list[TokenLogprob]:
        """The tokens of a next piece of text."""
        if not self.is_asked:
            return []
        self._n_text += len(text.encode("utf-8"))
        taken = []
        for entry in self._generation.logprobs[self._n_token :]:
            if self._n_byte >= self._n_text:
                break
            taken.append(entry)
            self._n_byte += entry.n_shown
        self._n_token += len(taken)
        return taken


def chat_logprobs(entries: Sequence[TokenLogprob]) -> dict[str, Any]:
    """The field `logprobs` of a choice of chat completions."""
    return {
        "content": [
            {**_of_chat(entry), "top_logprobs": [_of_chat(each) for each in entry.top]}
            for entry in entries
        ],
        "refusal": None,
    }


def _of_chat(entry: TokenLogprob) -> dict[str, Any]:
    return {"token": _text(entry), "logprob": entry.logprob, "bytes": list(entry.data)}


def text_logprobs(entries: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
    """The field `logprobs` of a choice of text completions.

    offset  characters of the text before the first token
    """
    offsets, decoder = [], codecs.getincrementaldecoder("utf-8")("replace")
    for entry in entries:
        offsets.append(offset)
        offset += len(decoder.decode(entry.data)) if entry.n_shown else 0
    return {
        "tokens": [_text(entry) for entry in entries],
        "token_logprobs": [entry.logprob for entry in entries],
        "top_logprobs": [{_text(each): each.logprob for each in entry.top} for entry in entries],
        "text_offset": offsets,
    }


def _text(entry: TokenLogprob) -> str:
    return entry.data.decode("utf-8", "replace")
