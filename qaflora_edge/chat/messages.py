"""Messages in OpenAI's shape: checked, and as templates expect them."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qaflora_edge.errors import PromptError

Message = Mapping[str, Any]
BEGIN, END = "<tool_call>", "</tool_call>"  # of a tool call, as Qwen and Hermes write it


def begin_with(system: str | None, messages: Sequence[Message]) -> Sequence[Message]:
    """Put a system prompt before messages that begin with none."""
    if system is None or not isinstance(messages, list | tuple) or not messages:
        return messages  # what is no conversation is refused elsewhere
    first = messages[0]
    if isinstance(first, Mapping) and first.get("role") in ("system", "developer"):
        return messages
    return [{"role": "system", "content": system}, *messages]


def checked_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Give messages with `content` as one text, and the arguments of tool calls as objects.

    OpenAI's role `developer` is what templates call `system`.

    Raises PromptError for what is no message, with its number and field.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Iterable) or not messages:
        raise PromptError(
            f"The conversation is {messages!r:.100}, expected a list of messages, "
            'as in [{"role": "user", "content": "How many ...?"}].'
        )
    return [_checked(i, message) for i, message in enumerate(messages)]


def _checked(i: int, message: Message) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise _wrong(i, "is", message)
    checked = {key: value for key, value in message.items() if value is not None}
    match message.get("role"):
        case "developer":
            checked["role"] = "system"
        case str():
            pass
        case role:
            raise _wrong(i, "has role =", role)
    match message.get("content"):
        case str():
            pass
        case None if checked["role"] == "assistant" and "tool_calls" in message:
            checked["content"] = ""
        case [_, *_] as parts if all(map(_is_text, parts)):
            checked["content"] = "".join(part["text"] for part in parts)
        case content:
            raise _wrong(i, "has content =", content)
    if (calls := checked.get("tool_calls")) is not None:
        if not isinstance(calls, list):
            raise _wrong(i, "has the tool calls", calls, _CALL)
        checked["tool_calls"] = [_tool_call(i, call) for call in calls]
    return checked


def _is_text(part: Any) -> bool:
    match part:
        case {"type": "text" | "input_text" | "output_text", "text": str()}:
            return True
    return False


def _tool_call(i: int, call: Any) -> dict[str, Any]:
    """Read the arguments of a call, which OpenAI writes as JSON text."""
    match call:
        case {"function": {"name": str()} as function}:
            arguments = function.get("arguments", {})
            try:
                arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
            except (ValueError, RecursionError) as error:
                raise _wrong(i, "has the tool call", call, _CALL) from error
            return {**call, "function": {**function, "arguments": arguments}}
    raise _wrong(i, "has the tool call", call, _CALL)


_CALL = '{"type": "function", "function": {"name": ..., "arguments": JSON text}}'


def _wrong(i: int, what: str, found: Any, expected: str | None = None) -> PromptError:
    expected = expected or 'a text, as in {"role": "user", "content": "How many ...?"}'
    return PromptError(f"Message {i} {what} {found!r:.200}, expected {expected}.")
