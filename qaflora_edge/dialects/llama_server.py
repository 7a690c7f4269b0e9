"""llama-server's own completions, and its infill of gaps in code."""

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from qaflora_edge.ask import Ask, Gap, Question
from qaflora_edge.dialects.extras import NOTHING, Extras
from qaflora_edge.dialects.options import sampling_of
from qaflora_edge.inference.generation import Generation


def ask(body: Mapping[str, Any], defaults: Ask) -> Ask:
    """Read a body of /completion; see openai_chat.ask."""
    return _asked(body, body["prompt"], defaults)


def ask_infill(body: Mapping[str, Any], defaults: Ask) -> Ask:
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


def _asked(body: Mapping[str, Any], question: Question, defaults: Ask) -> Ask:
    sampling = sampling_of({**body, "top_logprobs": None}, defaults.sampling)
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
    body: Mapping[str, Any],
    model_name: str,
    answers: Iterable[Generation],
    extras: Extras = NOTHING,
) -> Iterator[dict[str, Any]]:
    """Yield answers as events; the last of each is all that is told without a stream."""
    for answer in answers:
        yield from _events(body, model_name, answer, extras)


def _events(
    body: Mapping[str, Any], model_name: str, answer: Generation, extras: Extras
) -> Iterator[dict[str, Any]]:
    is_stream = bool(body.get("stream"))
    limit_ms = body.get("t_max_predict_ms") or math.inf
    start_s = time.perf_counter()
    text = ""
    for piece in answer:
        text += piece
        if is_stream:
            yield {"index": 0, "content": piece, "stop": False}
        spent_ms = 1e3 * (time.perf_counter() - start_s)
        if "\n" in text and spent_ms > limit_ms:
            answer.cancel()
    yield {
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
        **extras.end(answer),
    }
