"""Ollama's chats and texts."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Annotated, Any, Literal

from msgspec import Meta, defstruct

from qaflora_edge.answering.generation import Generation
from qaflora_edge.ask import Ask, Chat, Gap
from qaflora_edge.config import in_group
from qaflora_edge.dialects import openai_chat
from qaflora_edge.dialects.options import (
    Flag,
    MessageList,
    ToolList,
    Weighed,
    chosen_tools,
    option_field,
    read_body,
    thinking,
)
from qaflora_edge.dialects.shapes import NOTHING, Extras
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
Times = Callable[[Generation], dict[str, int]]


class OllamaBody(Weighed, frozen=True, kw_only=True):
    """Ask in Ollama's shape: sampling options apart, and a stream unless `stream` is false.

    options  see OllamaOptions
    """

    stream_media = "application/x-ndjson"
    model: Annotated[str, Meta(min_length=1, title="a model that GET /api/tags lists")]
    options: Annotated[Json | None, Meta(title='an object, as in {"temperature": 0}')] = None
    stream: Flag = None
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


_Options: Any = defstruct(
    "_Options",
    [option_field(name, in_group("sampling")[name]) for name in OF_OLLAMA],
    frozen=True,
    kw_only=True,
)


class OllamaOptions(_Options, frozen=True, kw_only=True):  # type: ignore[misc, call-arg]
    """Say how Ollama's clients sample."""

    num_predict: Annotated[
        int | None, Meta(title="a number of tokens, 0 or less for as many as there is room for")
    ] = None


def ask_chat(body: OllamaChatBody, defaults: Ask) -> Ask | None:
    """Read a body of /api/chat; None without messages. See openai_chat.ask."""
    messages = chat_messages(body.messages or ())
    if not messages:
        return None
    chat = Chat(messages, chosen_tools(body.tools, None), chat_template_kwargs=_variables(body))
    return replace(_answered(body, defaults), prompt=chat)


def ask_text(body: OllamaTextBody, defaults: Ask) -> Ask | None:
    """Read a body of /api/generate; None without a text."""
    if body.images:
        raise _has_images("The request")
    text = body.prompt or ""
    if not (text or body.suffix):
        return None
    question = replace(_answered(body, defaults), prompt=text, parse_special=True)
    if body.suffix:
        gap = Gap(text, body.suffix, n_answer=question.sampling.max_tokens or 0)
        return replace(question, prompt=gap)
    if body.raw:
        return question
    messages = [{"role": "user", "content": text}]
    if body.system:
        messages.insert(0, {"role": "system", "content": body.system})
    chat = Chat(messages, chat_template_kwargs=_variables(body), untemplated=text)
    return replace(question, prompt=chat)


def _answered(body: OllamaBody, defaults: Ask) -> Ask:
    options = _options(body.options or {})
    sampling = {name: getattr(options, name) for name in OF_OLLAMA}
    if options.num_predict is not None and options.num_predict > 0:
        sampling["max_tokens"] = options.num_predict
    given = {name: value for name, value in sampling.items() if value is not None}
    schema = {"type": "object"} if body.format == "json" else body.format or None
    return replace(defaults, sampling=defaults.sampling.updated(given), json_schema=schema)


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


def _variables(body: OllamaBody) -> Json | None:
    return None if body.think is None else thinking(body.think)


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


def _parts(answer: Generation) -> Iterator[Part]:
    """Yield the parts of a streamed message; calls come whole, as Ollama has them."""
    calls: list[Json] = []
    for choice in openai_chat.SHAPE.choices(answer):
        part = choice["delta"]
        part.pop("role", None)
        for call in part.pop("tool_calls", ()):
            add_part(calls, call)
        if part:
            yield part
    if calls and openai_chat.arguments_of(calls[-1]) is None:
        calls.pop()  # it is cut
    if calls:
        yield {"tool_calls": calls}


def events(
    head: Json,
    fields: Fields,
    is_stream: bool,
    times: Times,
    answers: Iterable[Generation],
    extras: Extras = NOTHING,
) -> Iterator[Json]:
    """Yield answers as lines of a stream, or each as one.

    times  gives the durations of a last line
    """
    more: Json = {"done": False}
    for answer in answers:
        message: Json = {}
        if is_stream:
            for thought, draft in extras.drafting(answer):
                line = head | fields({"reasoning_content": thought}) | more
                if draft:
                    line["fusion"] = draft
                yield line
            for part in _parts(answer):
                yield head | fields(part) | more
        else:
            message = openai_chat.SHAPE.choice(answer)["message"]
            if thought := extras.thought_of(answer):
                message["reasoning_content"] = thought
        last = head | fields(message)
        last["done"] = True
        last["done_reason"] = "stop" if answer.finish_reason == "stop" else "length"
        yield last | times(answer) | extras.end(answer)
