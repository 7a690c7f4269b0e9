"""OpenAI's completions of text."""

import codecs
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from qaflora_edge.ask import Ask
from qaflora_edge.dialects.openai_shapes import Shape, ShownTokens, token_text
from qaflora_edge.dialects.options import sampling_of
from qaflora_edge.inference.generation import Generation
from qaflora_edge.inference.sequence import TokenLogprob

_NO_LOGPROBS = {"logprobs": None, "top_logprobs": None}  # which are others here
N_ANSWER = 16  # tokens, where nobody says


def asks(body: Mapping[str, Any], defaults: Ask) -> list[Ask]:
    """Read a body: an Ask for each of its prompts; see openai_chat.ask."""
    sampling = sampling_of({**body, **_NO_LOGPROBS}, defaults.sampling)
    n_token = N_ANSWER if sampling.max_tokens is None else sampling.max_tokens
    sampling = replace(sampling, max_tokens=n_token, logprobs=body.get("logprobs"))
    question = replace(
        defaults,
        sampling=sampling,
        json_schema=body.get("json_schema"),
        n=body.get("n", 1),
        parse_special=True,
    )
    return [replace(question, prompt=prompt) for prompt in several(body["prompt"])]


def several(value: Any) -> list[Any]:
    """List the texts, or token ids, of a field that holds one of them or several."""
    is_text = isinstance(value, str)
    is_ids = not is_text and len(value) > 0 and isinstance(value[0], int)
    return [value] if is_text or is_ids else value


def _text_choice(generation: Generation) -> dict[str, Any]:
    text = generation.text()
    logprobs = text_logprobs(ShownTokens(generation).take(text), 0)
    return {"text": text, "logprobs": logprobs, "finish_reason": generation.finish_reason}


def _text_choices(generation: Generation) -> Iterator[dict[str, Any]]:
    shown = ShownTokens(generation)
    offset = 0
    for piece in generation:
        logprobs = text_logprobs(shown.take(piece), offset)
        offset += len(piece)
        yield {"text": piece, "logprobs": logprobs, "finish_reason": None}
    yield {**_nothing(""), "finish_reason": generation.finish_reason}


def _nothing(thought: str) -> dict[str, Any]:
    return {"text": "", "logprobs": None, "finish_reason": None}


SHAPE = Shape(_text_choice, _text_choices, _nothing)


def text_logprobs(entries: Sequence[TokenLogprob] | None, offset: int) -> Any:
    """Make the field `logprobs` of a choice of text completions.

    offset  characters of the text before the first token
    """
    if entries is None:
        return None
    offsets = []
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for entry in entries:
        offsets.append(offset)
        offset += len(decoder.decode(entry.data)) if entry.n_shown else 0
    return {
        "tokens": [token_text(entry) for entry in entries],
        "token_logprobs": [entry.logprob for entry in entries],
        "top_logprobs": [
            {token_text(each): each.logprob for each in entry.top} for entry in entries
        ],
        "text_offset": offsets,
    }
