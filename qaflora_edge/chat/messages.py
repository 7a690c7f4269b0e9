"""Messages in OpenAI's shape: checked, and as templates expect them."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qaflora_edge.errors import PromptError

Message = Mapping[str, Any]
BEGIN, END = "<tool_call>", "</tool_call>"  # of a tool call, as Qwen and Hermes write it


def begin_with(system: str | None, messages: Sequence[Message]) -> Sequence[Message]:
    """Messages behind a system prompt, where they do not begin with one."""
    if system is None or not isinstance(messages, list | tuple) or not messages:
        return messages  # what is no conversation is refused elsewhere
    first = messages[0]
    if isinstance(first, Mapping) and first.get("role") in ("system", "developer"):
        return messages
    return [{"role": "system", "content": system}, *messages]


def checked_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages with `content` as one text, and the arguments of tool calls as objects.

    OpenAI's role `developer` is what templates call `system`.

    Raises PromptError for what is no message, with its number and field.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Iterable):
        raise PromptError(
            f"The conversation is {messages!r:.100}, expected a list of messages, "
            'as in [{"role": "user", "content": "How many ...?"}].'
        )
    if not messages:
        raise PromptError("The conversation is empty; give at least one message.")
    return [_checked(i, message) for i, message in enumerate(messages)]


def _checked(i: int, message: Message) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise _wrong(i, "is", message)
    if not isinstance(message.get("role"), str):
        raise _wrong(i, "has role =", message.get("role"))
    checked = {key: value for key, value in message.items() if value is not None}
    checked["content"] = _text(i, message)
    if checked["role"] == "developer":
        checked["role"] = "system"
    if "tool_calls" in checked:
        checked["tool_calls"] = _tool_calls(i, checked["tool_calls"])
    return checked


def _text(i: int, message: Message) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    if content is None and message.get("role") == "assistant" and "tool_calls" in message:
        return ""
    if isinstance(content, list) and content and all(map(_is_text_part, content)):
        return "".join(part["text"] for part in content)
    raise _wrong(i, "has content =", content)


def _is_text_part(part: Any) -> bool:
    return (
        isinstance(part, Mapping)
        and part.get("type") == "text"
        and isinstance(part.get("text"), str)
    )


def _wrong(i: int, what: str, found: Any) -> PromptError:
    text = repr(found)
    text = text if len(text) <= 200 else f"{text[:197]}..."
    return PromptError(
        f"Message {i} {what} {text}, expected a text, "
        'as in {"role": "user", "content": "How many ...?"}.'
    )


def _tool_calls(i: int, calls: Any) -> list[dict[str, Any]]:
    """Tool calls whose arguments, which OpenAI writes as JSON text, are what the text says."""
    if not isinstance(calls, list):
        raise _wrong_call(i, calls)
    checked = []
    for call in calls:
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise _wrong_call(i, call)
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError) as err:
                raise _wrong_call(i, call) from err
        checked.append({**call, "function": {**function, "arguments": arguments}})
    return checked


def _wrong_call(i: int, found: Any) -> PromptError:
    return PromptError(
        f"Message {i} has the tool call {found!r:.200}, expected "
        '{"type": "function", "function": {"name": ..., "arguments": JSON text}}.'
    )
