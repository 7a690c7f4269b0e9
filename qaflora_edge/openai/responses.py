"""OpenAI's responses, stateless: their requests as a chat's, and a chat's answer as theirs."""

import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qaflora_edge.errors import wrong_option
from qaflora_edge.inference.generation import Generation
from qaflora_edge.openai.options import check_fixed
from qaflora_edge.openai.tools import parse_calls, shown_text

# What would need what was said before, or another server.
_FIXED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("previous_response_id", "conversation", "prompt"), (None,)),
    "background": (None, False),
    "truncation": (None, "disabled"),
    "max_tool_calls": (None,),
    "top_logprobs": (None, 0),
    # Of other shapes.
    "n": (None, 1),
    "logprobs": (None, False),
    **dict.fromkeys(("response_format", "json_schema"), (None,)),
    "include": (None, [], ["reasoning.encrypted_content"]),  # of which there is none
}
# What a response always has; of it nothing is done here.
_CONSTANT: dict[str, Any] = {
    "background": False,
    "error": None,
    "max_tool_calls": None,
    "object": "response",
    "previous_response_id": None,
    "reasoning": {"effort": None, "summary": None},
    "service_tier": "default",
    "store": False,
    "top_logprobs": 0,
    "truncation": "disabled",
}
_OF_TOOL = {"description": None, "parameters": None, "strict": None}
_TEXT_PARTS = ("input_text", "output_text", "text")


def chat_request(body: Mapping[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return messages of a chat, and its options, for a request whose types are checked.

    Raises OptionError for a field that cannot be followed.
    """
    check_fixed("responses", {name: body[name] for name in _FIXED if name in body}, _FIXED)
    messages = _messages(body["input"])
    if (instructions := body.get("instructions")) is not None:
        messages.insert(0, {"role": "system", "content": instructions})
    options: dict[str, Any] = {
        "max_tokens": body.get("max_output_tokens"),
        "response_format": _response_format(body.get("text")),
        "tools": _tools(body.get("tools")),
        "tool_choice": _tool_choice(body.get("tool_choice")),
    }
    for name in ("temperature", "top_p", "parallel_tool_calls"):
        options[name] = body.get(name)
    return messages, {name: value for name, value in options.items() if value is not None}


def _messages(given: Any) -> list[dict[str, Any]]:
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    messages: list[dict[str, Any]] = []
    for item in given:
        kind = item.get("type", "message") if isinstance(item, Mapping) else None
        if kind == "message":
            messages.append({"role": item.get("role"), "content": _content(item.get("content"))})
        elif kind == "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments", "{}")}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            last = messages[-1] if messages else {}
            if last.get("role") == "assistant":
                last.setdefault("tool_calls", []).append(call)
            else:
                messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
        elif kind == "function_call_output":
            content = _content(item.get("output"))
            messages.append(
                {"role": "tool", "tool_call_id": item.get("call_id"), "content": content}
            )
        elif kind != "reasoning":
            raise wrong_option("input", item, "items of the types message and function_call")
    return messages


def _content(content: Any) -> Any:
    """Parts of text as those of a chat; what is none is refused where messages are checked."""
    if not isinstance(content, list):
        return content
    return [
        {"type": "text", "text": part.get("text")}
        if isinstance(part, Mapping) and part.get("type") in _TEXT_PARTS
        else part
        for part in content
    ]


def _response_format(text: Any) -> dict[str, Any] | None:
    form = (text or {}).get("format")
    if form is None:
        return None
    if not isinstance(form, Mapping):
        raise wrong_option("text", text, 'an object such as {"format": {"type": "text"}}')
    if form.get("type") != "json_schema":
        return dict(form)
    return {"type": "json_schema", "json_schema": {k: form[k] for k in form if k != "type"}}


def _tools(tools: Any) -> list[dict[str, Any]] | None:
    if tools is None:
        return None
    found = []
    for tool in tools:
        if not isinstance(tool, Mapping) or tool.get("type") != "function":
            raise wrong_option("tools", tool, 'functions, as in {"type": "function", "name": ...}')
        function = {name: tool[name] for name in tool if name not in ("type", "strict")}
        if function.get("parameters") is None:
            function.pop("parameters", None)
        found.append({"type": "function", "function": function})
    return found


def _tool_choice(choice: Any) -> Any:
    if isinstance(choice, Mapping) and choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    return choice


class ResponseShape:
    """One answer in the shape of a response.

    body     of the request, of which a response repeats some fields
    options  of the answer that are told, such as temperature
    """

    def __init__(
        self,
        model_name: str,
        body: Mapping[str, Any],
        options: Mapping[str, Any],
        generation: Generation,
    ) -> None:
        self._model, self._body, self._generation = model_name, body, generation
        self._options = options
        self._id, self._created = f"resp_{uuid.uuid4().hex}", int(time.time())
        self._number = 0

    def whole(self, *, has_tools: bool) -> dict[str, Any]:
        """Make the response, once the answer is there."""
        text = self._generation.text()
        text, calls = parse_calls(text) if has_tools else (text, [])
        return self._response(self._output(text, calls))

    def events(self, *, has_tools: bool) -> Iterator[dict[str, Any]]:
        """Yield the same as events, each with its type."""
        yield self._event("response.created", response=self._response(None))
        yield self._event("response.in_progress", response=self._response(None))
        calls: list[dict[str, Any]] = []
        text, item = "", _message("", "in_progress")
        for piece in shown_text(self._generation, calls) if has_tools else self._generation:
            if not text:
                yield from self._begin_text(item)
            text += piece
            yield self._text_event("response.output_text.delta", item, delta=piece, logprobs=[])
        output: list[dict[str, Any]] = []
        if text or not calls:
            if not text:
                yield from self._begin_text(item)
            output.append(_message(text, self._status(), item["id"]))
            yield from self._end_text(output[0])
        for call in calls:
            output.append(_call(call))
            yield from self._call_events(len(output) - 1, output[-1])
        response = self._response(output)
        yield self._event(f"response.{response['status']}", response=response)

    def _begin_text(self, item: dict[str, Any]) -> Iterator[dict[str, Any]]:
        empty = {**item, "content": []}
        yield self._event("response.output_item.added", output_index=0, item=empty)
        part = {"type": "output_text", "text": "", "annotations": []}
        yield self._text_event("response.content_part.added", item, part=part)

    def _end_text(self, item: dict[str, Any]) -> Iterator[dict[str, Any]]:
        part = item["content"][0]
        yield self._text_event("response.output_text.done", item, text=part["text"], logprobs=[])
        yield self._text_event("response.content_part.done", item, part=part)
        yield self._event("response.output_item.done", output_index=0, item=item)

    def _call_events(self, index: int, item: dict[str, Any]) -> Iterator[dict[str, Any]]:
        begun = {**item, "arguments": "", "status": "in_progress"}
        place = {"output_index": index, "item_id": item["id"]}
        yield self._event("response.output_item.added", output_index=index, item=begun)
        arguments = item["arguments"]
        yield self._event("response.function_call_arguments.delta", **place, delta=arguments)
        yield self._event(
            "response.function_call_arguments.done", **place, arguments=arguments, name=item["name"]
        )
        yield self._event("response.output_item.done", output_index=index, item=item)

    def _text_event(self, kind: str, item: Mapping[str, Any], **more: Any) -> dict[str, Any]:
        place = {"item_id": item["id"], "output_index": 0, "content_index": 0}
        return self._event(kind, **place, **more)

    def _event(self, kind: str, **more: Any) -> dict[str, Any]:
        self._number += 1
        return {"type": kind, "sequence_number": self._number - 1, **more}

    def _status(self) -> str:
        is_cut = self._generation.finish_reason in ("length", "cancelled")
        return "incomplete" if is_cut else "completed"

    def _output(self, text: str, calls: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        messages = [_message(text, self._status())] if text or not calls else []
        return [*messages, *map(_call, calls)]

    def _response(self, output: list[dict[str, Any]] | None) -> dict[str, Any]:
        """Make the response; without output it is on its way."""
        body, generation = self._body, self._generation
        status = "in_progress" if output is None else self._status()
        cut = {"reason": "max_output_tokens"} if status == "incomplete" else None
        usage = {
            "input_tokens": generation.n_prompt,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": generation.n_completion,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": generation.n_prompt + generation.n_completion,
        }
        return {
            **_CONSTANT,
            "id": self._id,
            "created_at": self._created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "incomplete_details": cut,
            "instructions": body.get("instructions"),
            "max_output_tokens": body.get("max_output_tokens"),
            "model": self._model,
            "output": output or [],
            "parallel_tool_calls": body.get("parallel_tool_calls") is not False,
            "prompt_cache_key": body.get("prompt_cache_key"),
            "safety_identifier": body.get("safety_identifier"),
            **self._options,
            "text": body.get("text") or {"format": {"type": "text"}},
            "tool_choice": body.get("tool_choice") or "auto",
            "tools": [{**_OF_TOOL, **tool} for tool in body.get("tools") or ()],
            "usage": None if output is None else usage,
            "metadata": body.get("metadata") or {},
        }


def _message(text: str, status: str, item_id: str | None = None) -> dict[str, Any]:
    return {
        "id": item_id or f"msg_{uuid.uuid4().hex}",
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
