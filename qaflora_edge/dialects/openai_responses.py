"""OpenAI's responses, stateless: their requests as a chat's, and a chat's answer as theirs."""

import time
import uuid
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from qaflora_edge.answering.generation import Generation
from qaflora_edge.ask import Ask, Sampling
from qaflora_edge.dialects import openai_chat
from qaflora_edge.dialects.options import FIXED, SAMPLING, Count, Text, Tooled, check_off
from qaflora_edge.dialects.shapes import NOTHING, Extras
from qaflora_edge.formats.inputs import Json, Object


class TextForm(Struct, frozen=True):
    """Say what text an answer is."""

    format: Json | None = None


class Reasoning(Struct, frozen=True):
    """Say how long to think."""

    effort: str | None = None


class Item(Struct, frozen=True):
    """Hold a part of a conversation: a message, a call of a tool, or what it gave."""

    type: Literal["message", "function_call", "function_call_output", "reasoning"] = "message"
    role: str | None = None
    content: str | list[Any] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str = "{}"
    output: str | list[Any] | None = None


class ResponsesBody(Tooled, frozen=True, kw_only=True):
    """Ask /v1/responses; the fields without a type have to be off, see _OFF."""

    input: Annotated[
        Text | Annotated[list[Item], Meta(min_length=1)], Meta(title="a text or a list of items")
    ]
    instructions: str | None = None
    max_output_tokens: Count | None = None
    text: Annotated[
        TextForm | None, Meta(title='an object such as {"format": {"type": "text"}}')
    ] = None
    reasoning: Annotated[Reasoning | None, Meta(title='an object such as {"effort": "low"}')] = None
    logprobs: Any = None
    top_logprobs: Any = None
    previous_response_id: Any = None
    conversation: Any = None
    prompt: Any = None
    background: Any = None
    response_format: Any = None


# The answer would be wrong without: each has to be off, or at one of these values.
_OFF: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("previous_response_id", "conversation", "prompt", "background"), ()),
    **dict.fromkeys(("top_logprobs", "logprobs", "response_format", "json_schema"), ()),
    "n": (1,),
    **FIXED,
}
# Fields that a response must have. They repeat nothing of the request.
_CONSTANT: Json = {
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


def ask(body: ResponsesBody, defaults: Ask) -> Ask:
    """Read a body as a chat's: see openai_chat.ask."""
    check_off("responses", body, _OFF)
    messages = _messages(body.input)
    if body.instructions is not None:
        messages.insert(0, {"role": "system", "content": body.instructions})
    sampling = {name: getattr(body, name) for name in SAMPLING}
    if body.max_output_tokens is not None:
        sampling["max_tokens"] = body.max_output_tokens
        sampling["max_completion_tokens"] = None
    chat = openai_chat.ChatBody(
        messages=messages,
        tools=body.tools,
        tool_choice=body.tool_choice,
        parallel_tool_calls=body.parallel_tool_calls,
        response_format=body.text.format if body.text else None,
        reasoning_effort=body.reasoning.effort if body.reasoning else None,
        **sampling,
    )
    return openai_chat.ask(chat, defaults)


def _messages(items: str | list[Item]) -> list[Json]:
    if isinstance(items, str):
        return [{"role": "user", "content": items}]
    messages: list[Json] = []
    for item in items:
        if item.type == "message":
            messages.append({"role": item.role, "content": item.content})
        elif item.type == "function_call":
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": None})
            function = {"name": item.name, "arguments": item.arguments}
            call = {"id": item.call_id, "type": "function", "function": function}
            messages[-1].setdefault("tool_calls", []).append(call)
        elif item.type == "function_call_output":
            output = {"role": "tool", "tool_call_id": item.call_id, "content": item.output}
            messages.append(output)
    return messages


def head_of(model_name: str, sampling: Sampling) -> Json:
    """Make a response that is in progress; it must have some sampling options."""
    return {
        **_CONSTANT,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "frequency_penalty": sampling.frequency_penalty,
        "presence_penalty": sampling.presence_penalty,
        "id": f"resp_{uuid.uuid4().hex}",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": "in_progress",
        "incomplete_details": None,
        "model": model_name,
        "output": [],
        "usage": None,
    }


def events(head: Json, generation: Generation, extras: Extras = NOTHING) -> Iterator[Json]:
    """Yield an answer as events, each with its type and number; the last has the whole response.

    head  see head_of
    """
    for number, (kind, fields) in enumerate(_events(head, generation, extras)):
        event = {"type": f"response.{kind}", "sequence_number": number}
        yield event | fields


Events = Iterator[tuple[str, Json]]


def _events(head: Json, generation: Generation, extras: Extras) -> Events:
    yield "created", {"response": head | extras.mix(generation.fusion)}
    items = _Items()
    for part in openai_chat.answer_parts(generation):
        if isinstance(part, str):
            yield from items.text(part)
        else:
            yield from items.call(part)
    if not items.output:
        yield from items.text("")
    is_cut = generation.finish_reason in ("length", "cancelled")
    status = "completed"
    if is_cut:
        status = "incomplete"
    yield from items.close(status)
    response = head | {"status": status, "output": items.output, "usage": _usage(generation)}
    if is_cut:
        response["incomplete_details"] = {"reason": "max_output_tokens"}
    else:
        response["completed_at"] = int(time.time())
    yield status, {"response": response | extras.end(generation)}


def _usage(generation: Generation) -> Json:
    n_generated = generation.n_draft + generation.n_completion
    return {
        "input_tokens": generation.n_prompt,
        "input_tokens_details": {"cached_tokens": generation.n_cached, "cache_write_tokens": 0},
        "output_tokens": n_generated,
        "output_tokens_details": {"reasoning_tokens": generation.n_thought},
        "total_tokens": generation.n_prompt + n_generated,
    }


class _Items:
    """Write the events of an answer's items, one after another: its text, and calls of tools.

    output  the items; the last is open
    """

    def __init__(self) -> None:
        self.output: list[Json] = []

    def text(self, text: str) -> Events:
        if not self.output or self.output[-1]["type"] != "message":
            part = {"type": "output_text", "text": "", "annotations": []}
            item = {"type": "message", "role": "assistant", "content": [part]}
            yield from self._begin("msg", item, content=[])
            added = self._place(content_index=0, part=dict(part))
            yield "content_part.added", added
        self.output[-1]["content"][0]["text"] += text
        delta = self._place(content_index=0, delta=text, logprobs=[])
        yield "output_text.delta", delta

    def call(self, part: Object) -> Events:
        function = part["function"]
        if "id" in part:
            item = {"type": "function_call", "call_id": part["id"]}
            yield from self._begin("fc", item | function, arguments="")
        elif function["arguments"]:
            self.output[-1]["arguments"] += function["arguments"]
        if function["arguments"]:
            yield "function_call_arguments.delta", self._place(delta=function["arguments"])

    def close(self, status: str) -> Events:
        """End the last item, if there is one."""
        if not self.output:
            return
        item = self.output[-1]
        item["status"] = status
        if item["type"] == "message":
            (part,) = item["content"]
            text = self._place(content_index=0, text=part["text"], logprobs=[])
            yield "output_text.done", text
            yield "content_part.done", self._place(content_index=0, part=part)
        else:
            call = self._place(name=item["name"], arguments=item["arguments"])
            yield "function_call_arguments.done", call
        last = len(self.output) - 1
        yield "output_item.done", {"output_index": last, "item": item}

    def _begin(self, kind: str, item: Json, **empty: Any) -> Events:
        """End the item before, and begin one: `empty` replaces what is told of it at first."""
        yield from self.close("completed")
        item["id"] = f"{kind}_{uuid.uuid4().hex}"
        item["status"] = "in_progress"
        self.output.append(item)
        last = len(self.output) - 1
        yield "output_item.added", {"output_index": last, "item": item | empty}

    def _place(self, **fields: Any) -> Json:
        last = len(self.output) - 1
        place = {"item_id": self.output[last]["id"], "output_index": last}
        return place | fields
