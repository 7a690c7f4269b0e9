"""Ollama's chats and texts."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import Annotated, Any, Literal

from msgspec import Meta, defstruct

from qaflora_edge.answering.generation import Generation
from qaflora_edge.ask import Ask, Chat, Gap
from qaflora_edge.config import in_group
from qaflora_edge.dialects import openai_chat
from qaflora_edge.dialects.dialect import Answers, Dialect, Reply, Wire, encoded, told
from qaflora_edge.dialects.options import (
    Flag,
    MessageList,
    StreamedBody,
    ToolList,
    chosen_tools,
    option_field,
    read_body,
    said,
    thinking,
)
from qaflora_edge.errors import ModalityError
from qaflora_edge.formats.inputs import Json, Object
from qaflora_edge.prompt.calls import add_part

# Options that are called as ours are.
OF_OLLAMA = (
    *("temperature", "top_k", "top_p", "min_p", "seed", "stop"),
    *("repeat_penalty", "presence_penalty", "frequency_penalty"),
)
Part = Object  # of a message, in OpenAI's shape
Fields = Callable[[Part], Json]  # a part in Ollama's


class OllamaBody(StreamedBody, frozen=True, kw_only=True):
    """Ask in Ollama's shape: sampling options apart, and a stream unless `stream` is false.

    options  see OllamaOptions
    """

    model: Annotated[str, Meta(min_length=1, title="a model that GET /api/tags lists")]
    options: Annotated[Json | None, Meta(title='an object, as in {"temperature": 0}')] = None
    think: Annotated[
        bool | str | None, Meta(title="true, false, or a text such as none or high")
    ] = None
    format: Annotated[Json | Literal["", "json"] | None, Meta(title="json, or a JSON schema")] = (
        None
    )
    keep_alive: Any = None

    @property
    def is_stream(self) -> bool:
        return self.stream is not False

    @property
    def is_unload(self) -> bool:
        return self.keep_alive in (0, "0", "0s")

    @property
    def effort(self) -> str | bool | None:
        return self.think


class OllamaChatBody(OllamaBody, frozen=True, kw_only=True):
    """Ask /api/chat."""

    messages: MessageList | None = None
    tools: ToolList = None


class OllamaTextBody(OllamaBody, frozen=True, kw_only=True):
    """Ask /api/generate."""

    prompt: str | None = None
    suffix: str | None = None
    system: str | None = None
    raw: Flag = None
    images: list[str] | None = None


_N_TOKEN = "a number of tokens, 0 or less for as many as there is room for"
# How Ollama's clients sample.
OllamaOptions: Any = defstruct(
    "OllamaOptions",
    [
        *(option_field(name, in_group("sampling")[name]) for name in OF_OLLAMA),
        ("num_predict", Annotated[int | None, Meta(title=_N_TOKEN)], None),
    ],
    frozen=True,
    kw_only=True,
)


def chat_asks(body: OllamaChatBody, defaults: Ask) -> list[Ask]:
    """Read a body of /api/chat; nothing without messages. See openai_chat.asks."""
    messages = chat_messages(body.messages or ())
    if not messages:
        return []
    chat = Chat(messages, chosen_tools(body.tools, None), chat_template_kwargs=thinking(body.think))
    return [replace(_answered(body, defaults), prompt=chat)]


def text_asks(body: OllamaTextBody, defaults: Ask) -> list[Ask]:
    """Read a body of /api/generate; nothing without a text."""
    if body.images:
        raise _has_images("The request")
    text = body.prompt or ""
    if not (text or body.suffix):
        return []
    question = replace(_answered(body, defaults), prompt=text, parse_special=True)
    if body.suffix:
        gap = Gap(text, body.suffix, n_answer=question.sampling.max_tokens or 0)
        return [replace(question, prompt=gap)]
    if body.raw:
        return [question]
    messages = [{"role": "user", "content": text}]
    if body.system:
        messages.insert(0, {"role": "system", "content": body.system})
    chat = Chat(messages, chat_template_kwargs=thinking(body.think), untemplated=text)
    return [replace(question, prompt=chat)]


def _answered(body: OllamaBody, defaults: Ask) -> Ask:
    options = _options(body.options or {})
    sampling = {name: getattr(options, name) for name in OF_OLLAMA}
    if options.num_predict is not None and options.num_predict > 0:
        sampling["max_tokens"] = options.num_predict
    schema = {"type": "object"} if body.format == "json" else body.format or None
    return replace(defaults, sampling=defaults.sampling.updated(said(sampling)), json_schema=schema)


def _options(given: Json) -> OllamaOptions:
    """Read options: -1 is what nobody asked for, and a whole number may be 3.0."""
    ours: Json = {}
    for name, value in given.items():
        is_whole = isinstance(value, float) and value.is_integer()
        number = int(value) if is_whole else value
        if (name, number) not in (("seed", -1), ("top_k", -1), ("repeat_penalty", 0)):
            ours[name] = number
    if isinstance(stops := ours.pop("stop", None), list):
        stops = [text for text in stops if text != ""] or None
    ours["stop"] = stops
    return read_body(OllamaOptions, ours, "options")


def _has_images(who: str) -> ModalityError:
    return ModalityError(
        f"{who} has images, expected text alone: a bundle reads no images. Leave them out."
    )


def chat_messages(messages: Iterable[Object]) -> list[Json]:
    """Return messages as OpenAI has them; calls get ids, which some templates ask for."""
    ours: list[Json] = []
    ids: list[str] = []  # of calls that no message has answered
    for n, theirs in enumerate(messages):
        message = {"content": "", **theirs}
        if message.pop("images", None):
            raise _has_images(f"Message {n}")
        for old, new in (("thinking", "reasoning_content"), ("tool_name", "name")):
            if old in message:
                message[new] = message.pop(old)
        calls = message.get("tool_calls")
        if isinstance(calls, list) and all(isinstance(call, dict) for call in calls):
            with_ids = [{"id": f"{n:06d}{i:03d}"} | call for i, call in enumerate(calls)]
            message["tool_calls"] = with_ids
            ids = [call["id"] for call in with_ids]
        if message.get("role") == "tool" and ids:
            message.setdefault("tool_call_id", ids.pop(0))
        ours.append(message)
    return ours


def chat_fields(part: Part) -> Json:
    """Write a part of a message for /api/chat."""
    message: Json = {"role": "assistant", "content": part.get("content") or ""}
    if thought := part.get("reasoning_content"):
        message["thinking"] = thought
    if calls := part.get("tool_calls"):
        message["tool_calls"] = [_call(i, call) for i, call in enumerate(calls)]
    return {"message": message}


def text_fields(part: Part) -> Json:
    """Write a part of a message for /api/generate."""
    fields = {"response": part.get("content") or ""}
    if thought := part.get("reasoning_content"):
        fields["thinking"] = thought
    return fields


def _call(index: int, call: Object) -> Json:
    function = {
        "index": index,
        "name": call["function"]["name"],
        "arguments": openai_chat.arguments_of(call) or {},
    }
    return {"id": call["id"], "function": function}


def _whole(fields: Fields, reply: Reply, answers: Answers) -> Json:
    """Write an answer as one line; without one, that the model is loaded, or closed."""
    answer = next(answers, None)
    if answer is None:
        reason = "unload" if reply.body.is_unload else "load"
        return _head(reply) | fields({}) | {"done": True, "done_reason": reason}
    message = openai_chat.SHAPE.choice(answer, reply.extras)["message"]
    return _last(reply, fields(message), answer)


def _pieces(fields: Fields, reply: Reply, answers: Answers) -> Iterator[Json]:
    """Yield an answer as lines, of which the last says how it ended."""
    if not reply.asks:
        yield _whole(fields, reply, answers)
        return
    answer = next(answers)
    head = _head(reply)
    more: Json = {"done": False}
    calls: list[Json] = []  # they come whole, as Ollama has them
    for piece in told(answer, reply.extras):
        if piece.kind == "draft":
            yield head | fields({}) | more | {"fusion": {"draft": piece.text}}
        elif piece.kind == "thought":
            yield head | fields({"reasoning_content": piece.text}) | more
        elif piece.kind == "text":
            yield head | fields({"content": piece.text}) | more
        else:
            add_part(calls, piece.call)
    if calls and openai_chat.arguments_of(calls[-1]) is None:
        calls.pop()  # it is cut
    if calls:
        yield head | fields({"tool_calls": calls}) | more
    yield _last(reply, fields({}), answer)


def _head(reply: Reply) -> Json:
    return {"model": reply.body.model, "created_at": written_time(reply.created_s)}


def written_time(time_s: float) -> str:
    written = datetime.fromtimestamp(time_s, UTC).isoformat()
    return written.replace("+00:00", "Z")


def _last(reply: Reply, fields: Json, answer: Generation) -> Json:
    reason = "stop" if answer.finish_reason == "stop" else "length"
    end = {"done": True, "done_reason": reason}
    return _head(reply) | fields | end | _counts(reply, answer) | reply.extras.end(answer)


def _counts(reply: Reply, answer: Generation) -> dict[str, int]:
    """Count tokens and nanoseconds as Ollama does; a relay's draft was generated too."""
    times = answer.timings
    draft = answer.draft
    draft_ms = 0.0 if draft is None else draft.draft_ms
    spent_s = time.perf_counter() - reply.facts["start_s"]
    return {
        "total_duration": int(1e9 * spent_s),
        "load_duration": int(1e6 * reply.facts["wait_ms"]),
        "prompt_eval_count": answer.n_prompt,
        "prompt_eval_duration": int(1e6 * (times.probe_ms + times.prefill_ms)),
        "eval_count": answer.usage["completion_tokens"],
        "eval_duration": int(1e6 * (draft_ms + times.decode_ms)),
    }


def _line(value: Any) -> bytes:
    return encoded(value) + b"\n"


LINES = Wire("application/x-ndjson", _line, whole=_line)
CHAT = Dialect(
    "/api/chat",
    "Answer a conversation, in the shape of Ollama.",
    OllamaChatBody,
    chat_asks,
    partial(_whole, chat_fields),
    partial(_pieces, chat_fields),
    LINES,
)
GENERATE = Dialect(
    "/api/generate",
    "Answer a text, or go on with it, in the shape of Ollama.",
    OllamaTextBody,
    text_asks,
    partial(_whole, text_fields),
    partial(_pieces, text_fields),
    LINES,
)
