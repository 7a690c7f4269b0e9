"""Completions of plain text: OpenAI's, llama-server's, and its infill of gaps in code."""

import codecs
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from qaflora_edge.answering.generation import Generation
from qaflora_edge.ask import Ask, Gap, Question
from qaflora_edge.dialects.options import sampling_of
from qaflora_edge.dialects.shapes import NOTHING, Extras, Shape, ShownTokens, token_text
from qaflora_edge.formats.inputs import Json, Object
from qaflora_edge.inference.sequence import TokenLogprob

N_ANSWER = 16  # tokens of OpenAI's, where nobody says


def several(value: Any) -> list[Any]:
    """List the texts, or token ids, of a field that holds one of them or several."""
    is_text = isinstance(value, str)
    is_ids = not is_text and len(value) > 0 and isinstance(value[0], int)
    return [value] if is_text or is_ids else value


def asks(body: Object, defaults: Ask) -> list[Ask]:
    """Read a body: an Ask for each of its prompts; see openai_chat.ask."""
    options = dict(body) | {"logprobs": None, "top_logprobs": None}  # others than those of chats
    sampling = sampling_of(options, defaults.sampling, "completions")
    n_token = N_ANSWER if sampling.max_tokens is None else sampling.max_tokens
    common = replace(
        defaults,
        sampling=replace(sampling, max_tokens=n_token, logprobs=body.get("logprobs")),
        json_schema=body.get("json_schema"),
        n=body.get("n", 1),
        parse_special=True,
    )
    return [replace(common, prompt=prompt) for prompt in several(body["prompt"])]


def _choice_of(text: str, logprobs: Any, finish_reason: str | None) -> Json:
    return {"text": text, "logprobs": logprobs, "finish_reason": finish_reason}


def _whole(generation: Generation) -> Json:
    text = generation.text()
    logprobs = text_logprobs(ShownTokens(generation).take(text), 0)
    return _choice_of(text, logprobs, generation.finish_reason)


def _chunks(generation: Generation) -> Iterator[Json]:
    shown = ShownTokens(generation)
    offset = 0
    for piece in generation:
        logprobs = text_logprobs(shown.take(piece), offset)
        offset += len(piece)
        yield _choice_of(piece, logprobs, None)
    yield _choice_of("", None, generation.finish_reason)


def _thought(thought: str) -> Json:
    return _choice_of("", None, None)


SHAPE = Shape("cmpl", "text_completion", "text_completion", _whole, _chunks, _thought)


def text_logprobs(entries: Sequence[TokenLogprob] | None, offset: int) -> Any:
    """Make the field `logprobs` of a choice of text completions.

    offset  characters of the text before the first token
    """
    if entries is None:
        return None
    offsets = []
    likeliest = []
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for entry in entries:
        offsets.append(offset)
        offset += len(decoder.decode(entry.data)) if entry.n_shown else 0
        likeliest.append({token_text(other): other.logprob for other in entry.top})
    return {
        "tokens": [token_text(entry) for entry in entries],
        "token_logprobs": [entry.logprob for entry in entries],
        "top_logprobs": likeliest,
        "text_offset": offsets,
    }


def ask(body: Object, defaults: Ask) -> Ask:
    """Read a body of /completion; see openai_chat.ask."""
    return _asked(body, body["prompt"], defaults)


def ask_infill(body: Object, defaults: Ask) -> Ask:
    """Read a body of /infill."""
    files = [(file["filename"], file["text"]) for file in body.get("input_extra") or ()]
    gap = Gap(
        body["input_prefix"] + body["prompt"],
        body["input_suffix"],
        files,
        n_answer=body.get("n_predict") or 0,
    )
    if n_prompt := body.get("n_prompt"):
        gap = replace(gap, n_prompt=n_prompt)
    return _asked(body, gap, defaults)


def _asked(body: Object, question: Question, defaults: Ask) -> Ask:
    options = dict(body) | {"top_logprobs": None}
    sampling = sampling_of(options, defaults.sampling, "completions")
    n_predict = body.get("n_predict")
    if n_predict is not None:
        sampling = replace(sampling, max_tokens=None if n_predict < 0 else n_predict)
    return replace(
        defaults,
        prompt=question,
        sampling=sampling,
        json_schema=body.get("json_schema"),
        parse_special=True,
    )


def events(
    body: Object, model_name: str, answers: Iterable[Generation], extras: Extras = NOTHING
) -> Iterator[Json]:
    """Yield answers as events; the last of each is all that is told without a stream."""
    is_stream = bool(body.get("stream"))
    limit_ms = body.get("t_max_predict_ms") or math.inf
    for answer in answers:
        start_s = time.perf_counter()
        text = ""
        for piece in answer:
            text += piece
            if is_stream:
                yield {"index": 0, "content": piece, "stop": False}
            spent_ms = 1e3 * (time.perf_counter() - start_s)
            if "\n" in text and spent_ms > limit_ms:
                answer.cancel()
        last = {
            "index": 0,
            "content": "" if is_stream else text,
            "stop": True,
            "model": model_name,
            "stop_type": "eos" if answer.finish_reason == "stop" else "limit",
            "truncated": False,
            "has_new_line": "\n" in text,
            "tokens_predicted": answer.n_completion,
            "tokens_evaluated": answer.n_prompt,
            "tokens_cached": answer.n_cached,
        }
        yield last | extras.end(answer)
