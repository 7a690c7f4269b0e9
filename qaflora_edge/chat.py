"""Conversations: the base's own chat template, and the OpenAI shape of answers.

What a person typed is data. A control token spelt out in a message stays text.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qaflora_edge.errors import ChatTemplateError, OptionError, PromptError
from qaflora_edge.generate import Generation
from qaflora_edge.runtime import Model

Message = Mapping[str, Any]
_ATTR_UNKNOWN = 1  # llama.h LLAMA_TOKEN_ATTR_UNKNOWN: parsed as special, like control tokens


def _check_messages(messages: Sequence[Message]) -> None:
    if not messages:
        raise PromptError("The conversation is empty; give at least one message.")
    for i, message in enumerate(messages):
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise PromptError(
                    f"Message {i} has {key} = {message.get(key)!r}, expected a text, "
                    'as in {"role": "user", "content": "How many ...?"}.'
                )


def _control_texts(model: Model, text: str) -> set[str]:
    """Spelt-out control tokens that the tokeniser would take for real ones."""
    tokens = model.tokenize(text, add_special=False, parse_special=True)
    return {
        model.piece(token, special=True).decode("utf-8", "replace")
        for token in tokens
        if model._lib.llama_vocab_is_control(model.vocab, token)
        or model._lib.llama_vocab_get_attr(model.vocab, token) & _ATTR_UNKNOWN
    }


def _hide_controls(
    model: Model, messages: Sequence[Message]
) -> tuple[list[Message], dict[str, str]]:
    """Messages with control texts replaced by marks, and what each mark stands for."""
    everything = "".join(
        value for message in messages for value in message.values() if isinstance(value, str)
    )
    controls = sorted(_control_texts(model, everything), key=len, reverse=True)
    unused = (chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in everything)
    marks = {next(unused): control for control in controls if control in everything}
    hidden: list[Message] = []
    for message in messages:
        safe = dict(message)
        for key, value in message.items():
            if isinstance(value, str):
                for mark, control in marks.items():
                    value = value.replace(control, mark)
                safe[key] = value
        hidden.append(safe)
    return hidden, marks


def _render(model: Model, messages: Sequence[Message]) -> str:
    template = model.chat_template
    if not template:
        raise ChatTemplateError(
            f"The base {model.path.name} has no chat template (tokenizer.chat_template is "
            "missing); give the prompt as plain text (--raw-prompt), or use an instruct model."
        )
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    lib = model._lib

    def special(token: int) -> str:
        return "" if token < 0 else model.piece(token, special=True).decode("utf-8", "replace")

    try:
        formatter = Jinja2ChatFormatter(
            template=template,
            eos_token=special(lib.llama_vocab_eos(model.vocab)),
            bos_token=special(lib.llama_vocab_bos(model.vocab)),
        )
        return str(formatter(messages=list(messages)).prompt)
    except Exception as err:  # a template is a program of the file's author: anything may come
        raise ChatTemplateError(
            f"The chat template of {model.path.name} refused the conversation: {err}. "
            "Give the prompt as plain text (--raw-prompt), or change the messages."
        ) from err


def chat_tokens(model: Model, messages: Sequence[Message]) -> list[int]:
    """Token ids of a conversation under the base's template, ready for an answer.

    Raises ChatTemplateError without a usable template, PromptError for malformed messages.
    """
    _check_messages(messages)
    hidden, marks = _hide_controls(model, messages)
    text = _render(model, hidden)

    tokens: list[int] = []
    plain = ""
    for char in text:
        if char in marks:
            tokens += model.tokenize(plain, add_special=False, parse_special=True)
            tokens += model.tokenize(marks[char], add_special=False, parse_special=False)
            plain = ""
        else:
            plain += char
    tokens += model.tokenize(plain, add_special=False, parse_special=True)

    bos = model._lib.llama_vocab_bos(model.vocab)
    if model._lib.llama_vocab_get_add_bos(model.vocab) and tokens[:1] != [bos]:
        tokens.insert(0, bos)
    return tokens


def response_schema(response_format: Mapping[str, Any] | None) -> Any:
    """The JSON schema that OpenAI's response_format asks for, or None for free text.

    Raises OptionError when it is none of text, json_object and json_schema.
    """
    if response_format is None:
        return None
    kind = response_format.get("type") if isinstance(response_format, Mapping) else None
    if kind == "text":
        return None
    if kind == "json_object":
        schema = response_format.get("schema")  # as llama-cpp-python has it
        return {"type": "object"} if schema is None else schema
    wrapped = response_format.get("json_schema") if kind == "json_schema" else None
    if not isinstance(wrapped, Mapping) or not isinstance(wrapped.get("schema"), Mapping):
        raise OptionError(
            f"Option response_format is {response_format!r}, expected {{'type': 'json_object'}} or "
            "{'type': 'json_schema', 'json_schema': {'schema': ...}}."
        )
    return wrapped["schema"]


def completion_dict(model_name: str, generation: Generation) -> dict[str, Any]:
    """A whole answer in the shape of OpenAI's chat completions."""
    text = generation.text()
    return {
        "id": f"chatcmpl-{uuid.uuid4()}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model_name,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text},
                "finish_reason": generation.finish_reason,
            }
        ],
        "usage": generation.usage,
    }


def completion_chunks(model_name: str, generation: Generation) -> Iterator[dict[str, Any]]:
    """The same as a stream of chunks: the role, then pieces, then the reason of the end."""
    head = {
        "id": f"chatcmpl-{uuid.uuid4()}",
        "object": "chat.completion.chunk",
        "created": int(time.time()),
        "model": model_name,
    }

    def chunk(delta: dict[str, str], reason: str | None = None) -> dict[str, Any]:
        return {**head, "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}

    yield chunk({"role": "assistant"})
    for piece in generation:
        yield chunk({"content": piece})
    yield chunk({}, generation.finish_reason)
