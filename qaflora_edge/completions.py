"""Answers in the shape of OpenAI's chat completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from qaflora_edge.errors import OptionError
from qaflora_edge.generate import Generation


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
