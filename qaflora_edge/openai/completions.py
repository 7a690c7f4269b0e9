"""Answers in the shape of OpenAI's completions of text; usage and log-probabilities of any."""

import codecs
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from qaflora_edge.inference.generation import Generation
from qaflora_edge.inference.sequence import TokenLogprob


def text_dict(model_name: str, answers: Iterable[Generation], n: int = 1) -> dict[str, Any]:
    """Put whole answers into OpenAI's shape; each is a choice.

    n  answers of each prompt
    """
    choices, ended = [], []
    for index, generation in enumerate(answers):
        shown, text = ShownTokens(generation), generation.text()
        logprobs = text_logprobs(shown.take(text), 0) if shown.is_asked else None
        choices.append(_choice(index, text, logprobs, generation.finish_reason))
        ended.append(generation)
    head = answer_head("text_completion", model_name)
    return {**head, "choices": choices, "usage": usage(ended, n)}


def text_chunks(
    head: dict[str, Any],
    answers: Iterable[Generation],
    n: int = 1,
    *,
    include_usage: bool = False,
) -> Iterator[dict[str, Any]]:
    """Yield the same as chunks, choices one after another.

    head  see answer_head
    """
    ended = []
    if include_usage:
        head = {**head, "usage": None}
    for index, generation in enumerate(answers):
        shown, offset = ShownTokens(generation), 0
        for piece in generation:
            entries = shown.take(piece)
            logprobs = text_logprobs(entries, offset) if entries else None
            offset += len(piece)
            yield {**head, "choices": [_choice(index, piece, logprobs, None)]}
        yield {**head, "choices": [_choice(index, "", None, generation.finish_reason)]}
        ended.append(generation)
    if include_usage:
        yield {**head, "choices": [], "usage": usage(ended, n)}


def usage(ended: Sequence[Generation], n: int) -> dict[str, int]:
    """Count tokens of answers; a prompt counts once for its n answers."""
    n_prompt = sum(generation.n_prompt for generation in ended[::n])
    n_completion = sum(generation.n_completion for generation in ended)
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_completion,
        "total_tokens": n_prompt + n_completion,
    }


def _choice(index: int, text: str, logprobs: Any, reason: str | None) -> dict[str, Any]:
    return {"text": text, "index": index, "logprobs": logprobs, "finish_reason": reason}


def answer_head(kind: str, model_name: str) -> dict[str, Any]:
    """Make what an answer, or each chunk of one, begins with.

    kind  text_completion, chat.completion or chat.completion.chunk
    """
    return {
        "id": f"{'chat' * kind.startswith('chat')}cmpl-{uuid.uuid4()}",
        "object": kind,
        "created": int(time.time()),
        "model": model_name,
    }


class ShownTokens:
    """Hands out tokens as their text is shown; those of a stop text are never."""

    def __init__(self, generation: Generation) -> None:
        self._generation = generation
        self.is_asked = generation.wants_logprobs
        self._n_token = self._n_byte = self._n_text = 0

    def take(self, text: str) -> list[TokenLogprob]:
        """Take the tokens of a next piece of text."""
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
    """Make the field `logprobs` of a choice of chat completions."""
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
    """Make the field `logprobs` of a choice of text completions.

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
