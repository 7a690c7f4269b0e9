"""Ollama's chats and texts."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from qaflora_edge.ask import Ask, Chat, Gap
from qaflora_edge.dialects import openai_chat
from qaflora_edge.dialects.extras import NOTHING, Extras
from qaflora_edge.dialects.options import chosen_tools, thinking
from qaflora_edge.errors import ModalityError
from qaflora_edge.inference.generation import Generation
from qaflora_edge.prompt.calls import add_part

_NO_IMAGES = "{} has images, expected text alone: a bundle reads no images. Leave them out."
Part = Mapping[str, Any]  # of a message, in OpenAI's shape
Fields = Callable[[Part], dict[str, Any]]  # a part in Ollama's
Times = Callable[[Generation], dict[str, int]]


def ask_chat(body: Mapping[str, Any], defaults: Ask) -> Ask | None:
    """Read a body of /api/chat; None without messages. See openai_chat.ask."""
    messages = chat_messages(body["messages"])
    if not messages:
        return None
    chat = Chat(
        messages,
        chosen_tools(body.get("tools"), None),
        chat_template_kwargs=_variables(body),
    )
    return replace(_answered(body, defaults), prompt=chat)


def ask_text(body: Mapping[str, Any], defaults: Ask) -> Ask | None:
    """Read a body of /api/generate; None without a text."""
    if body["images"]:
        raise ModalityError(_NO_IMAGES.format("The request"))
    text, suffix = body["prompt"], body["suffix"]
    if not (text or suffix):
        return None
    question = replace(_answered(body, defaults), prompt=text, parse_special=True)
    if suffix:
        gap = Gap(text, suffix, n_answer=question.sampling.max_tokens or 0)
        return replace(question, prompt=gap)
    if body.get("raw"):
        return question
    system = [{"role": "system", "content": body["system"]}] if body["system"] else []
    messages = [*system, {"role": "user", "content": text}]
    chat = Chat(messages, chat_template_kwargs=_variables(body), untemplated=text)
    return replace(question, prompt=chat)


def _answered(body: Mapping[str, Any], defaults: Ask) -> Ask:
    """Read how the answer is sampled, and its form."""
    form = body["format"]
    schema = {"type": "object"} if form == "json" else form or None
    return replace(
        defaults, sampling=defaults.sampling.updated(_sampling(body)), json_schema=schema
    )


def _sampling(body: Mapping[str, Any]) -> dict[str, Any]:
    """Give the sampling options in our names."""
    options = dict(body.get("options") or {})
    n_predict = options.pop("num_predict", -1)
    if n_predict > 0:
        options["max_tokens"] = n_predict
    return options


def _variables(body: Mapping[str, Any]) -> dict[str, Any] | None:
    return None if body.get("think") is None else thinking(body["think"])


def chat_messages(messages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return messages as OpenAI has them; calls get ids, which some templates ask for."""
    ours: list[dict[str, Any]] = []
    ids: list[str] = []  # of calls that no message has answered
    for n, theirs in enumerate(messages):
        message = {"content": "", **theirs}
        if message.pop("images", None):
            raise ModalityError(_NO_IMAGES.format(f"Message {n}"))
        for old, new in (("thinking", "reasoning_content"), ("tool_name", "name")):
            if old in message:
                message[new] = message.pop(old)
        calls = message.get("tool_calls")
        if isinstance(calls, list) and all(isinstance(call, dict) for call in calls):
            calls = [{"id": f"{n:06d}{i:03d}", **call} for i, call in enumerate(calls)]
            message["tool_calls"] = calls
            ids = [call["id"] for call in calls]
        if message.get("role") == "tool" and ids:
            message.setdefault("tool_call_id", ids.pop(0))
        ours.append(message)
    return ours


def chat_fields(part: Part) -> dict[str, Any]:
    """Write a part of a message for /api/chat."""
    message: dict[str, Any] = {"role": "assistant", "content": part.get("content") or ""}
    message |= _thought(part)
    if calls := part.get("tool_calls"):
        message["tool_calls"] = [_call(i, call) for i, call in enumerate(calls)]
    return {"message": message}


def text_fields(part: Part) -> dict[str, Any]:
    """Write a part of a message for /api/generate."""
    return {"response": part.get("content") or "", **_thought(part)}


def _thought(part: Part) -> dict[str, Any]:
    thought = part.get("reasoning_content")
    return {"thinking": thought} if thought else {}


def _call(index: int, call: Mapping[str, Any]) -> dict[str, Any]:
    """Return a call as Ollama has it, with its arguments as an object."""
    function = call["function"]
    arguments = _arguments(call) or {}
    named = {"index": index, "name": function["name"]}
    return {"id": call["id"], "function": {**named, "arguments": arguments}}


def _arguments(call: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read a call's arguments; None where they are cut, or no object."""
    try:
        arguments = json.loads(call["function"]["arguments"])
    except (ValueError, RecursionError):
        return None
    return arguments if isinstance(arguments, dict) else None


def _parts(answer: Generation) -> Iterator[Part]:
    """Yield the parts of a streamed message; calls come whole, as Ollama has them."""
    calls: list[dict[str, Any]] = []
    for choice in openai_chat.SHAPE.choices(answer):
        part = {name: value for name, value in choice["delta"].items() if name != "role"}
        for call in part.pop("tool_calls", ()):
            add_part(calls, call)
        if part:
            yield part
    if calls and _arguments(calls[-1]) is None:
        calls.pop()  # it is cut
    if calls:
        yield {"tool_calls": calls}


def events(
    head: Mapping[str, Any],
    fields: Fields,
    is_stream: bool,
    times: Times,
    answers: Iterable[Generation],
    extras: Extras = NOTHING,
) -> Iterator[dict[str, Any]]:
    """Yield answers as lines of a stream, or each as one.

    times  gives the durations of a last line
    """
    for answer in answers:
        message: Part = {}
        if is_stream:
            for piece in answer.drafting():
                thought = {"reasoning_content": piece} if extras.drafts_are_thoughts else {}
                drafted = {} if thought else extras.draft(piece)
                yield {**head, **fields(thought), "done": False, **drafted}
            for part in _parts(answer):
                yield {**head, **fields(part), "done": False}
        else:
            message = openai_chat.SHAPE.choice(answer)["message"]
            if answer.draft is not None and extras.drafts_are_thoughts:
                message = {**message, "reasoning_content": answer.draft.text}
        reason = "stop" if answer.finish_reason == "stop" else "length"
        yield {
            **head,
            **fields(message),
            "done": True,
            "done_reason": reason,
            **times(answer),
            **extras.end(answer),
        }
