"""OpenAI's responses, stateless: their requests as a chat's, and a chat's answer as theirs."""

import itertools
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
    calls: list[dict[str, Any]] = []
    output: list[dict[str, Any]] = []
    pieces = iter(openai_chat.shown_pieces(generation, calls))
    first = next(pieces, "")  # without one, the calls are known
    if first or not calls:
        item = _message("", "in_progress")
        yield from _text_events(item, itertools.chain([first], pieces))
        item["status"] = _status(generation)
        yield "output_item.done", {"output_index": 0, "item": item}
        output.append(item)
    for call in calls:
        item = _call(call)
        yield from _call_events(item, len(output))
        output.append(item)
    response = _ended(head, output, generation)
    yield response["status"], {"response": {**response, **extras.end(generation)}}


def _text_events(item: dict[str, Any], pieces: Iterable[str]) -> Events:
    """Tell a text as it comes, and put it into its item."""
    part = item["content"][0]
    place = {"item_id": item["id"], "output_index": 0, "content_index": 0}
    yield "output_item.added", {"output_index": 0, "item": {**item, "content": []}}
    yield "content_part.added", {**place, "part": dict(part)}
    for piece in pieces:
        part["text"] += piece
        yield "output_text.delta", {**place, "delta": piece, "logprobs": []}
    yield "output_text.done", {**place, "text": part["text"], "logprobs": []}
    yield "content_part.done", {**place, "part": part}


def _call_events(item: dict[str, Any], index: int) -> Events:
    """Tell a call, which comes whole."""
    name = item["name"]
    arguments = item["arguments"]
    place = {"output_index": index, "item_id": item["id"]}
    begun = {**item, "arguments": "", "status": "in_progress"}
    yield "output_item.added", {"output_index": index, "item": begun}
    yield "function_call_arguments.delta", {**place, "delta": arguments}
    yield (
        "function_call_arguments.done",
        {**place, "name": name, "arguments": arguments},
    )
    yield "output_item.done", {"output_index": index, "item": item}


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
        "status": "completed",
    }
