"""Completions of plain text: OpenAI's, llama-server's, and its infill of gaps in code."""

import codecs
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from qaflora_edge.answering.generation import Generation
from qaflora_edge.ask import Ask, Gap, Question
from qaflora_edge.dialects.dialect import Answers, Dialect, Extras, Reply
from qaflora_edge.dialects.openai_chat import CHUNKS, Shape, ShownTokens, token_text
from qaflora_edge.dialects.options import (
    FIXED,
    MAX_PROMPTS,
    Answered,
    Count,
    NTop,
    Prompts,
    Text,
    Tokens,
    check_off,
    sampling_of,
)
from qaflora_edge.errors import wrong_field
from qaflora_edge.formats.inputs import Json
from qaflora_edge.inference.sequence import TokenLogprob

N_ANSWER = 16  # tokens of OpenAI's, where nobody says


_PROMPTS = "a text, a list of token ids, or a list of these, {} at most"


class TextBody(Answered, frozen=True, kw_only=True):
    """Ask /v1/completions."""

    prompt: Annotated[Prompts, Meta(title=_PROMPTS.format(MAX_PROMPTS))]
    logprobs: NTop | None = None


class CompletionBody(Answered, frozen=True, kw_only=True):
    """Ask /completion."""

    prompt: Annotated[Text | Tokens, Meta(title="a text or a list of token ids")]
    n_predict: (
        Annotated[
            int, Meta(title="a number of tokens, or -1 for as many as there is room for", ge=-1)
        ]
        | None
    ) = None
    n: Annotated[Literal[1] | None, Meta(title="1: this path gives one answer")] = None
    t_max_predict_ms: Annotated[
        Count | None, Meta(title="milliseconds after which the answer ends with its line")
    ] = None


class ExtraFile(Struct, frozen=True):
    """Name another file, and give its text."""

    filename: str = "file"
    text: str = ""


class InfillBody(CompletionBody, frozen=True, kw_only=True):
    """Ask /infill."""

    input_prefix: Annotated[str, Meta(title="the text before the gap")] = ""
    input_suffix: Annotated[str, Meta(title="the text after the gap")] = ""
    input_extra: (
        Annotated[
            list[ExtraFile],
            Meta(
                title='a list such as [{"filename": "a.py", "text": "..."}]', max_length=MAX_PROMPTS
            ),
        ]
        | None
    ) = None
    prompt: Annotated[str, Meta(title="what the gap begins with")] = ""
    n_prompt: (
        Annotated[int, Meta(title="the most tokens of the prompt, 1 or more", ge=1)] | None
    ) = None


def several(field: str, value: Any, most: int) -> list[Any]:
    """List the texts, or token ids, of a field that holds one of them or several."""
    is_ids = len(value) > 0 and all(isinstance(item, int) for item in value)
    if isinstance(value, str) or is_ids:
        return [value]
    if len(value) > most or any(item == "" or isinstance(item, int) for item in value):
        raise wrong_field(field, value, _PROMPTS.format(most))
    return list(value)


def asks(body: TextBody, defaults: Ask) -> list[Ask]:
    """Read a body: an Ask for each of its prompts; see openai_chat.asks."""
    check_off("completions", body, FIXED)
    sampling = sampling_of(body, defaults.sampling)
    n_token = N_ANSWER if sampling.max_tokens is None else sampling.max_tokens
    common = replace(
        defaults,
        sampling=replace(sampling, max_tokens=n_token, logprobs=body.logprobs),
        json_schema=body.json_schema,
        n=1 if body.n is None else body.n,
        parse_special=True,
    )
    prompts = several("prompt", body.prompt, MAX_PROMPTS)
    return [replace(common, prompt=prompt) for prompt in prompts]


def _choice_of(text: str, logprobs: Any, finish_reason: str | None) -> Json:
    return {"text": text, "logprobs": logprobs, "finish_reason": finish_reason}


def _whole(generation: Generation, extras: Extras) -> Json:
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


def completion_asks(body: CompletionBody, defaults: Ask) -> list[Ask]:
    """Read a body of /completion; see openai_chat.asks."""
    return _asked(body, body.prompt, defaults)


def infill_asks(body: InfillBody, defaults: Ask) -> list[Ask]:
    """Read a body of /infill."""
    files = [(file.filename, file.text) for file in body.input_extra or ()]
    prefix = body.input_prefix + body.prompt
    gap = Gap(prefix, body.input_suffix, files, n_answer=body.n_predict or 0)
    if body.n_prompt is not None:
        gap = replace(gap, n_prompt=body.n_prompt)
    return _asked(body, gap, defaults)


def _asked(body: CompletionBody, question: Question, defaults: Ask) -> list[Ask]:
    check_off("completions", body, FIXED)
    sampling = sampling_of(body, defaults.sampling)
    if body.n_predict is not None:
        n_token = None if body.n_predict < 0 else body.n_predict
        sampling = replace(sampling, max_tokens=n_token)
    ask = replace(
        defaults,
        prompt=question,
        sampling=sampling,
        json_schema=body.json_schema,
        parse_special=True,
    )
    return [ask]


def whole(reply: Reply, answers: Answers) -> Json:
    """Make an answer of /completion or /infill."""
    *parts, last = pieces(reply, answers)
    text = "".join(part["content"] for part in parts)
    return last | {"content": text}


def pieces(reply: Reply, answers: Answers) -> Iterator[Json]:
    """Yield one as events; the last says how it ended."""
    answer = next(answers)
    limit_ms = reply.body.t_max_predict_ms or math.inf
    start_s = time.perf_counter()
    has_line = False
    for piece in answer:
        yield {"index": 0, "content": piece, "stop": False}
        has_line = has_line or "\n" in piece
        spent_ms = 1e3 * (time.perf_counter() - start_s)
        if has_line and spent_ms > limit_ms:
            answer.cancel()
    last = {
        "index": 0,
        "content": "",
        "stop": True,
        "model": reply.model,
        "stop_type": "eos" if answer.finish_reason == "stop" else "limit",
        "truncated": False,
        "has_new_line": has_line,
        "tokens_predicted": answer.n_completion,
        "tokens_evaluated": answer.n_prompt,
        "tokens_cached": answer.n_cached,
    }
    yield last | reply.extras.end(answer)


COMPLETIONS = Dialect(
    "/v1/completions",
    "Go on with a text.",
    TextBody,
    asks,
    SHAPE.whole,
    SHAPE.pieces,
    CHUNKS,
    SHAPE.progress,
)
COMPLETION = Dialect(
    "/completion",
    "Go on with a text, in the shape of llama-server.",
    CompletionBody,
    completion_asks,
    whole,
    pieces,
)
INFILL = Dialect(
    "/infill",
    "Fill a gap in code, in the shape of llama-server.",
    InfillBody,
    infill_asks,
    whole,
    pieces,
)
