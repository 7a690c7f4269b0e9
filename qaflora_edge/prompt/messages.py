"""Messages in OpenAI's shape, checked; and prompts as callers in Python give them."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any

from qaflora_edge.ask import Chat, Question
from qaflora_edge.errors import ModalityError, OptionError, PromptError
from qaflora_edge.formats.inputs import Json, Object

Message = Object
ROLES = ("system", "developer", "user", "assistant", "tool", "function")


def begin_with(
    system: str | None, messages: Sequence[Message], examples: Sequence[Message] = ()
) -> Sequence[Message]:
    """Put a system prompt before messages that begin with none, and examples behind it."""
    if not isinstance(messages, list | tuple) or not messages:
        return messages  # what is no conversation is refused elsewhere
    first = messages[0]
    if isinstance(first, Mapping) and first.get("role") in ("system", "developer"):
        return [first, *examples, *messages[1:]]
    if system is None:
        return [*examples, *messages]
    return [{"role": "system", "content": system}, *examples, *messages]


def checked_messages(messages: Sequence[Message]) -> list[Json]:
    """Give messages with `content` as one text, and the arguments of tool calls as objects.

    OpenAI's role `developer` is what templates call `system`.

    Raises PromptError with the number and field of a malformed message.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Iterable) or not messages:
        raise PromptError(
            f"The conversation is {messages!r:.100}, expected a list of messages, "
            'as in [{"role": "user", "content": "How many ...?"}].'
        )
    return [_checked(i, message) for i, message in enumerate(messages)]


def _checked(i: int, message: Message) -> Json:
    if not isinstance(message, Mapping):
        raise _wrong(i, "is", message)
    checked = {key: value for key, value in message.items() if value is not None}
    role = checked.get("role")
    if not isinstance(role, str):
        raise _wrong(i, "has role =", role)
    if role not in ROLES:
        raise _wrong(i, "has role =", role, f"one of {', '.join(ROLES)}")
    if role == "developer":
        checked["role"] = "system"
    content = checked.get("content")
    if content is None and role == "assistant" and "tool_calls" in message:
        content = ""  # who calls tools may say nothing
    elif isinstance(content, list) and content:
        content = _joined(i, content)
    if not isinstance(content, str):
        raise _wrong(i, "has content =", content)
    checked["content"] = content
    thought = checked.get("reasoning_content", "")
    if not isinstance(thought, str):
        raise _wrong(i, "has reasoning_content =", thought)
    if calls := checked.get("tool_calls"):
        listed = calls if isinstance(calls, list) else [calls]
        checked["tool_calls"] = [_tool_call(i, call) for call in listed]
    return checked


_TEXTS = ("text", "input_text", "output_text")  # the last two are of responses


def _joined(i: int, parts: Sequence[Any]) -> Any:
    texts = []
    for part in parts:
        part_type = part.get("type") if isinstance(part, Mapping) else None
        if isinstance(part_type, str) and part_type not in _TEXTS:
            raise ModalityError(
                f"Message {i} has a part of type {part_type!r:.40}, expected texts alone: a bundle "
                "reads no images, audio or files. Leave it out, or send what it says as text."
            )
        text = None if part_type is None else part.get("text")
        if not isinstance(text, str):
            return parts
        texts.append(text)
    return "".join(texts)


def _tool_call(i: int, call: Any) -> Json:
    function: Any = call.get("function") if isinstance(call, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise _wrong(i, "has the tool call", call, _CALL)
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise _wrong(i, "has the tool call", call, _CALL) from error
    parsed = dict(function) | {"arguments": arguments}
    return dict(call) | {"function": parsed}


_CALL = '{"type": "function", "function": {"name": ..., "arguments": JSON text}}'


def _wrong(i: int, what: str, value: Any, expected: str | None = None) -> PromptError:
    expected = expected or 'a text, as in {"role": "user", "content": "How many ...?"}'
    return PromptError(f"Message {i} {what} {value!r:.200}, expected {expected}.")


def as_turn(prompt: Any, *, is_plain: bool = False) -> Question:
    """Take messages as a conversation, and so a text where there is a chat template.

    is_plain  a text stays as it is
    """
    if isinstance(prompt, str) and prompt and not is_plain:
        return Chat([{"role": "user", "content": prompt}], untemplated=prompt)
    question: Question = Chat(prompt) if is_conversation(prompt) else prompt
    return question


def whole(prompt: Any) -> Any:
    return list(prompt) if isinstance(prompt, Iterator) else prompt


def is_conversation(prompt: Any) -> bool:
    """Tell messages from texts and ids."""
    return isinstance(prompt, Sequence) and any(isinstance(part, Mapping) for part in prompt)


def are_many(prompt: Any) -> bool:
    """Tell a list of prompts from one: a text, messages, or a sequence of ids."""
    if isinstance(prompt, str | Mapping) or not isinstance(prompt, Iterable):
        return False  # one, if a wrong one
    return not is_conversation(prompt) and any(not isinstance(part, Integral) for part in prompt)


def paired(prompt: Any, continuation: Any) -> list[tuple[Any, Any]]:
    """Put each prompt next to its continuation; one of both, or lists of the same length."""
    if not are_many(prompt) and not are_many(continuation):
        return [(prompt, continuation)]
    if are_many(prompt) and are_many(continuation) and len(prompt) == len(continuation):
        return list(zip(prompt, continuation, strict=True))
    raise OptionError(
        f"score got {prompt!r:.60} and {continuation!r:.60}, expected one of both, or "
        "lists of the same length: repeat a prompt, as in [prompt] * 3."
    )
