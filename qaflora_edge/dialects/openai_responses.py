"""OpenAI's responses, stateless: their requests as a chat's, and a chat's answer as theirs."""

import time
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from qaflora_edge.answering.generation import Generation
from qaflora_edge.ask import Ask
from qaflora_edge.dialects import openai_chat
from qaflora_edge.dialects.dialect import (
    NAMED_EVENTS,
    AnswerBlock,
    Answers,
    BlockEvent,
    Dialect,
    Reply,
    block_events,
    told,
)
from qaflora_edge.dialects.options import FIXED, SAMPLING, Count, Text, Tooled, check_off
from qaflora_edge.formats.inputs import Json


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


def asks(body: ResponsesBody, defaults: Ask) -> list[Ask]:
    """Read a body as a chat's: see openai_chat.asks."""
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
    return openai_chat.asks(chat, defaults)


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


def _head(reply: Reply) -> Json:
    """Make a response that is in progress; it must have some sampling options."""
    sampling = reply.asks[0].sampling
    return {
        **_CONSTANT,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "frequency_penalty": sampling.frequency_penalty,
        "presence_penalty": sampling.presence_penalty,
        "id": f"resp_{reply.id.hex}",
        "created_at": int(reply.created_s),
        "completed_at": None,
        "status": "in_progress",
        "incomplete_details": None,
        "model": reply.model,
        "output": [],
        "usage": None,
    }


def whole(reply: Reply, answers: Answers) -> Json:
    """Make the whole response."""
    *_, (_, last) = _events(reply, next(answers))
    response: Json = last["response"]
    return response


def pieces(reply: Reply, answers: Answers) -> Iterator[Json]:
    """Yield an answer as events, each with its type and number; the last has the whole response."""
    for number, (kind, fields) in enumerate(_events(reply, next(answers))):
        event = {"type": f"response.{kind}", "sequence_number": number}
        yield event | fields


Events = Iterator[tuple[str, Json]]


def _events(reply: Reply, generation: Generation) -> Events:
    head = _head(reply)
    yield "created", {"response": head | reply.extras.mix(generation.fusion)}
    output = []
    pieces = (piece for piece in told(generation) if piece.kind != "thought")
    for event in block_events(pieces):
        status = "in_progress"
        if event.name == "stop":
            status = _status(generation) if event.is_last else "completed"
            output.append(_item(event.block, status))
        yield from _item_events(event, status)
    status = _status(generation)
    response = head | {"status": status, "output": output, "usage": _usage(generation)}
    if status == "incomplete":
        response["incomplete_details"] = {"reason": "max_output_tokens"}
    else:
        response["completed_at"] = int(time.time())
    yield status, {"response": response | reply.extras.end(generation)}


def _status(generation: Generation) -> str:
    """Say how an answer ended."""
    is_cut = generation.finish_reason in ("length", "cancelled")
    return "incomplete" if is_cut else "completed"


def _usage(generation: Generation) -> Json:
    n_generated = generation.n_draft + generation.n_completion
    return {
        "input_tokens": generation.n_prompt,
        "input_tokens_details": {"cached_tokens": generation.n_cached, "cache_write_tokens": 0},
        "output_tokens": n_generated,
        "output_tokens_details": {"reasoning_tokens": generation.n_thought},
        "total_tokens": generation.n_prompt + n_generated,
    }


def _text_part(text: str) -> Json:
    return {"type": "output_text", "text": text, "annotations": []}


def _item(block: AnswerBlock, status: str) -> Json:
    """Write a block as far as it is."""
    if block.kind == "text":
        item: Json = {
            "type": "message",
            "role": "assistant",
            "content": [_text_part(block.text)],
            "id": f"msg_{block.id}",
        }
    else:
        item = {
            "type": "function_call",
            "call_id": block.call["id"],
            "name": block.call["function"]["name"],
            "arguments": block.text,
            "id": f"fc_{block.id}",
        }
    item["status"] = status
    return item


def _item_events(event: BlockEvent, status: str) -> Events:
    """Write what happens to an item: a text, which is the one part of a message, or a call."""
    block = event.block
    item = _item(block, status)
    of_item = {"output_index": block.index, "item": item}
    place = {"item_id": item["id"], "output_index": block.index}
    in_text = place | {"content_index": 0}
    match event.name, block.kind:
        case "start", "text":
            item["content"] = []
            yield "output_item.added", of_item
            yield "content_part.added", in_text | {"part": _text_part("")}
        case "delta", "text":
            yield "output_text.delta", in_text | {"delta": event.text, "logprobs": []}
        case "stop", "text":
            yield "output_text.done", in_text | {"text": block.text, "logprobs": []}
            yield "content_part.done", in_text | {"part": _text_part(block.text)}
            yield "output_item.done", of_item
        case "start", _:
            yield "output_item.added", of_item
        case "delta", _:
            yield "function_call_arguments.delta", place | {"delta": event.text}
        case "stop", _:
            call = {"name": item["name"], "arguments": block.text}
            yield "function_call_arguments.done", place | call
            yield "output_item.done", of_item


RESPONSES = Dialect(
    "/v1/responses",
    "Answer as a response.",
    ResponsesBody,
    asks,
    whole,
    pieces,
    NAMED_EVENTS,
)
