"""Ollama's chats and texts."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from qaflora_edge.answering.generation import Generation
from qaflora_edge.ask import Ask, Chat, Gap
from qaflora_edge.dialects import openai_chat
from qaflora_edge.dialects.options import chosen_tools, thinking
from qaflora_edge.dialects.shapes import NOTHING, Extras
from qaflora_edge.errors import ModalityError
from qaflora_edge.formats.inputs import Json, Object
from qaflora_edge.prompt.calls import add_part

Part = Object  # of a message, in OpenAI's shape
Fields = Callable[[Part], Json]  # a part in Ollama's
Times = Callable[[Generation], dict[str, int]]


def ask_chat(body: Object, defaults: Ask) -> Ask | None:
    """Read a body of /api/chat; None without messages. See openai_chat.ask."""
    messages = chat_messages(body["messages"])
    if not messages:
        return None
    tools = chosen_tools(body.get("tools"), None)
    chat = Chat(messages, tools, chat_template_kwargs=_variables(body))
    return replace(_answered(body, defaults), prompt=chat)


def ask_text(body: Object, defaults: Ask) -> Ask | None:
    """Read a body of /api/generate; None without a text."""
    if body["images"]:
        raise _has_images("The request")
    text = body["prompt"]
    suffix = body["suffix"]
    if not (text or suffix):
        return None
    question = replace(_answered(body, defaults), prompt=text, parse_special=True)
    if suffix:
        gap = Gap(text, suffix, n_answer=question.sampling.max_tokens or 0)
        return replace(question, prompt=gap)
    if body.get("raw"):
        return question
    messages = [{"role": "user", "content": text}]
    if body["system"]:
        messages.insert(0, {"role": "system", "content": body["system"]})
    chat = Chat(messages, chat_template_kwargs=_variables(body), untemplated=text)
    return replace(question, prompt=chat)


def _answered(body: Object, defaults: Ask) -> Ask:
    options = dict(body.get("options") or {})
    n_predict = options.pop("num_predict", -1)
    if n_predict > 0:
        options["max_tokens"] = n_predict
    form = body["format"]
    schema = {"type": "object"} if form == "json" else form or None
    return replace(defaults, sampling=defaults.sampling.updated(options), json_schema=schema)


def _variables(body: Object) -> Json | None:
    return None if body.get("think") is None else thinking(body["think"])


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
