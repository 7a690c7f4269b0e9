"""OpenAI's responses, stateless: their requests as a chat's, and a chat's answer as theirs."""

import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qaflora_edge.ask import Ask, Sampling
from qaflora_edge.dialects import openai_chat
from qaflora_edge.dialects.extras import NOTHING, Extras
from qaflora_edge.dialects.options import FIXED, SAMPLING, check_off
from qaflora_edge.errors import wrong_option
from qaflora_edge.inference.generation import Generation

# The answer would be wrong without: each has to be off, or at one of these values.
_OFF: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("previous_response_id", "conversation", "prompt"), ()),
    **dict.fromkeys(("background", "top_logprobs", "logprobs"), ()),
    **dict.fromkeys(("response_format", "json_schema"), ()),
    "n": (1,),
}
_AS_IN_CHATS = (*SAMPLING, *FIXED, "tools", "tool_choice", "parallel_tool_calls")
_SHOWN = ("temperature", "top_p", "frequency_penalty", "presence_penalty")  # in a response
# Fields that a response must have. They repeat nothing of the request.
_CONSTANT: dict[str, Any] = {
    "object": "response",
    "background": False,
    "metadata": {},
    "parallel_tool_calls": True,
    "reasoning": {"effort": None, "summary": None},
    "service_tier": "default",
    "store": False,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
    "top_logprobs": 0,
    "truncation": "disabled",
    **dict.fromkeys(("error", "instructions", "max_output_tokens", "max_tool_calls"), None),
    **dict.fromkeys(("previous_response_id", "prompt_cache_key", "safety_identifier"), None),
}


def ask(body: Mapping[str, Any], defaults: Ask) -> Ask:
    """Read a body as a chat's: see openai_chat.ask.

    Raises OptionError for a field that cannot be followed.
    """
    check_off("responses", {name: body[name] for name in _OFF if name in body}, _OFF)
    messages = _messages(body["input"])
    if (instructions := body.get("instructions")) is not None:
        messages.insert(0, {"role": "system", "content": instructions})
    chat: dict[str, Any] = {name: body[name] for name in _AS_IN_CHATS if name in body}
    chat["messages"] = messages
    chat["response_format"] = (body.get("text") or {}).get("format")
    chat["reasoning_effort"] = (body.get("reasoning") or {}).get("effort")
    if (n_token := body.get("max_output_tokens")) is not None:
        chat["max_tokens"] = n_token
        chat["max_completion_tokens"] = None
    return openai_chat.ask(chat, defaults)


def _messages(asked: Any) -> list[dict[str, Any]]:
    if isinstance(asked, str):
        return [{"role": "user", "content": asked}]
    messages: list[dict[str, Any]] = []
    for item in asked:
        kind = item.get("type", "message") if isinstance(item, Mapping) else None
        if kind == "message":
            messages.append({"role": item.get("role"), "content": item.get("content")})
        elif kind == "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments", "{}")}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            last = messages[-1] if messages else {}
            if last.get("role") == "assistant":
                last.setdefault("tool_calls", []).append(call)
            else:
                messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
        elif kind == "function_call_output":
            output = item.get("output")
            answered = item.get("call_id")
            messages.append({"role": "tool", "tool_call_id": answered, "content": output})
        elif kind != "reasoning":
            raise wrong_option("input", item, "items of the types message and function_call")
    return messages


def head_of(model_name: str, sampling: Sampling) -> dict[str, Any]:
    """Make a response that is in progress; it must have some sampling options."""
    return {
        **_CONSTANT,
        **{name: getattr(sampling, name) for name in _SHOWN},
        "id": f"resp_{uuid.uuid4().hex}",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": "in_progress",
        "incomplete_details": None,
        "model": model_name,
        "output": [],
        "usage": None,
    }


def events(
    head: Mapping[str, Any], generation: Generation, extras: Extras = NOTHING
) -> Iterator[dict[str, Any]]:
    """Yield an answer as events, each with its type and number; the last has the whole response.

    head  see head_of
    """
    for number, (kind, fields) in enumerate(_events(head, generation, extras)):
        yield {"type": f"response.{kind}", "sequence_number": number, **fields}


Events = Iterator[tuple[str, dict[str, Any]]]


def _events(head: Mapping[str, Any], generation: Generation, extras: Extras) -> Events:
    yield "created", {"response": {**head, **extras.mix(generation.fusion)}}
    items = _Items()
    for part in openai_chat.answer_parts(generation):
        yield from items.text(part) if isinstance(part, str) else items.call(part)
    if not items.output:
        yield from items.text("")
    yield from items.close(_status(generation))
    response = _ended(head, items.output, generation)
    yield response["status"], {"response": {**response, **extras.end(generation)}}


class _Items:
    """Write the events of an answer's items, one after another: its text, and calls of tools.

    output  the items; the last is open
    """

    def __init__(self) -> None:
        self.output: list[dict[str, Any]] = []

    def text(self, text: str) -> Events:
        if not self._is_open("message"):
            yield from self._begin(_message("", "in_progress"), content=[])
            part = self.output[-1]["content"][0]
            yield "content_part.added", {**self._place(), "content_index": 0, "part": {**part}}
        self.output[-1]["content"][0]["text"] += text
        delta = {"content_index": 0, "delta": text, "logprobs": []}
        yield "output_text.delta", {**self._place(), **delta}

    def call(self, part: Mapping[str, Any]) -> Events:
        if "id" in part:
            yield from self._begin(_call(part), arguments="")
        delta = part["function"]["arguments"]
        if not delta:
            return
        if "id" not in part:
            self.output[-1]["arguments"] += delta
        yield "function_call_arguments.delta", {**self._place(), "delta": delta}

    def close(self, status: str) -> Events:
        if not self.output:
            return
        item = self.output[-1]
        item["status"] = status
        place = self._place()
        if item["type"] == "message":
            part = item["content"][0]
            content = {**place, "content_index": 0}
            yield "output_text.done", {**content, "text": part["text"], "logprobs": []}
            yield "content_part.done", {**content, "part": part}
        else:
            done = {"name": item["name"], "arguments": item["arguments"]}
            yield "function_call_arguments.done", {**place, **done}
        yield "output_item.done", {"output_index": place["output_index"], "item": item}

    def _is_open(self, kind: str) -> bool:
        return bool(self.output) and self.output[-1]["type"] == kind

    def _begin(self, item: dict[str, Any], **empty: Any) -> Events:
        """End the item before, and begin one: `empty` replaces what is told of it at first."""
        yield from self.close("completed")
        self.output.append(item)
        index = len(self.output) - 1
        yield "output_item.added", {"output_index": index, "item": {**item, **empty}}

    def _place(self) -> dict[str, Any]:
        return {"item_id": self.output[-1]["id"], "output_index": len(self.output) - 1}


def _status(generation: Generation) -> str:
    is_cut = generation.finish_reason in ("length", "cancelled")
    return "incomplete" if is_cut else "completed"


def _ended(
    head: Mapping[str, Any], output: Sequence[Mapping[str, Any]], generation: Generation
) -> dict[str, Any]:
    status = _status(generation)
    is_cut = status == "incomplete"
    usage = {
        "input_tokens": generation.n_prompt,
        "input_tokens_details": {"cached_tokens": generation.n_cached, "cache_write_tokens": 0},
        "output_tokens": generation.n_draft + generation.n_completion,
        "output_tokens_details": {"reasoning_tokens": generation.n_thought},
        "total_tokens": generation.usage["total_tokens"],
    }
    return {
        **head,
        "completed_at": None if is_cut else int(time.time()),
        "status": status,
        "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
        "output": output,
        "usage": usage,
    }


def _message(text: str, status: str) -> dict[str, Any]:
    return {
        "id": f"msg_{uuid.uuid4().hex}",
        "type": "message",
        "role": "assistant",
        "status": status,
        "content": [{"type": "output_text", "text": text, "annotations": []}],
    }


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "id": f"fc_{uuid.uuid4().hex}",
        "type": "function_call",
        "call_id": call["id"],
        "name": call["function"]["name"],
        "arguments": call["function"]["arguments"],
        "status": "in_progress",
    }
