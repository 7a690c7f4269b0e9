"""The description of the server's paths, in OpenAPI 3.1; the options come from `config`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from qaflora_edge import __version__
from qaflora_edge.config import Option, in_group
from qaflora_edge.server.fields import RETURNS
from qaflora_edge.server.options import MAX_CHOICES, MAX_MESSAGES, MAX_STOPS, MAX_TOOLS

Schema = dict[str, Any]
_TEXT: Schema = {"type": "string"}
_FLAG: Schema = {"type": ["boolean", "null"]}
_OBJECT: Schema = {"type": "object"}
_WHOLE: Schema = {"type": "integer"}
_ERROR: Schema = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": _TEXT,
                "type": _TEXT,
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_REFUSED = {
    "400": "A field is wrong; param names it",
    "401": "The API key is missing or wrong",
    "403": "The host or the page that asks is not allowed",
    "404": "There is no such model",
    "408": "The body was sent too slowly",
    "413": "The body is too large",
    "500": "The server failed",
    "503": "The queue is full, or the model cannot be opened; see Retry-After",
}


def _list(items: Schema, **more: Any) -> Schema:
    return {"type": "array", "items": items, **more}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _body(required: Iterable[str], properties: Schema) -> Schema:
    return {"type": "object", "required": list(required), "properties": properties}


def option_schema(option: Option) -> Schema:
    """An option of `config` as a JSON schema; null stands for the default."""
    kinds = {int: "integer", float: "number", str: "string", bool: "boolean"}
    if option.kind is tuple:
        texts = _list({"type": "string", "minLength": 1}, maxItems=MAX_STOPS)
        return {"anyOf": [{"type": "string", "minLength": 1}, texts, {"type": "null"}]}
    if option.kind is dict:
        number = {"type": "number", "minimum": option.low, "maximum": option.high}
        names = {"pattern": "^[0-9]+$"}
        biases = {"type": "object", "propertyNames": names, "additionalProperties": number}
        return _or_null(biases)
    schema: Schema = {"type": [kinds[option.kind], "null"], "description": option.help}
    if option.low is not None:
        schema["exclusiveMinimum" if option.is_open else "minimum"] = option.low
    if option.high is not None:
        schema["maximum"] = option.high
    return schema


def _sampling() -> Schema:
    found = {}
    for option in in_group("sampling").values():
        for name in (option.name, *option.aliases):
            found[name] = option_schema(option)
    return found


_NUMBERS = _list({"type": "number"})
_FUSION = _or_null(
    {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "strategy": {"type": ["string", "null"]},
            "adapters": _or_null(_list(_TEXT)),
            "weights": {
                "anyOf": [
                    {"type": "object", "additionalProperties": {"type": "number"}},
                    _list(_NUMBERS),
                    {"type": "null"},
                ]
            },
            "return": {"enum": [*RETURNS, None]},
        },
    }
)
_SCALE = _body(["id", "scale"], {"id": {**_WHOLE, "minimum": 0}, "scale": {"type": "number"}})
_MESSAGE = _body(
    ["role"],
    {
        "role": _TEXT,
        "content": {
            "anyOf": [
                _TEXT,
                _list(_body(["type"], {"type": _TEXT, "text": _TEXT})),
                {"type": "null"},
            ]
        },
    },
)
_MESSAGES = _list(_MESSAGE, minItems=1, maxItems=MAX_MESSAGES)
_MODEL: Schema = {"type": "string", "description": "An id of GET /v1/models."}
_USAGE_OPTIONS = _or_null(_body([], {"include_usage": _FLAG}))
_ANSWERED = {
    "model": _MODEL,
    "n": {"type": ["integer", "null"], "minimum": 1, "maximum": MAX_CHOICES},
    "stream": _FLAG,
    "stream_options": _USAGE_OPTIONS,
    "return_progress": _FLAG,
    "fusion": _FUSION,
    "lora": _or_null(_list(_SCALE)),
}
_FUNCTION = _body(["name"], {"name": _TEXT, "parameters": _OBJECT})
_TOOL = _body(["type", "function"], {"type": {"const": "function"}, "function": _FUNCTION})


def _chat() -> Schema:
    return _body(
        ["model", "messages"],
        {
            **_sampling(),
            **_ANSWERED,
            "messages": _MESSAGES,
            "logprobs": _FLAG,
            "top_logprobs": {"type": ["integer", "null"], "minimum": 0, "maximum": 20},
            "tools": _or_null(_list(_TOOL, maxItems=MAX_TOOLS)),
            "tool_choice": {"type": ["string", "object", "null"]},
            "parallel_tool_calls": _FLAG,
            "response_format": _or_null(_body(["type"], {"type": _TEXT})),
        },
    )


def _completion() -> Schema:
    prompts = [_TEXT, _list(_TEXT), _list(_WHOLE), _list(_list(_WHOLE))]
    properties = {**_sampling(), **_ANSWERED, "prompt": {"anyOf": prompts}, "echo": _FLAG}
    return _body(["model", "prompt"], properties)


def _response() -> Schema:
    return _body(
        ["model", "input"],
        {
            "model": _MODEL,
            "input": {"anyOf": [_TEXT, _list(_OBJECT)]},
            "instructions": {"type": ["string", "null"]},
            "stream": _FLAG,
            "max_output_tokens": {"type": ["integer", "null"], "minimum": 0},
            "temperature": option_schema(in_group("sampling")["temperature"]),
            "top_p": option_schema(in_group("sampling")["top_p"]),
            "fusion": _FUSION,
        },
    )


_ANSWER = _body(
    ["id", "object", "choices"], {"id": _TEXT, "object": _TEXT, "choices": _list(_OBJECT)}
)
_CARD = _body(["id", "object", "created", "owned_by"], {"id": _TEXT, "meta": _OBJECT})
_WEIGHTS = _body(
    ["adapters", "strategy", "n_layer", "weights"],
    {"adapters": _list(_TEXT), "n_layer": _WHOLE, "weights": _list(_NUMBERS)},
)


def _posted(summary: str, body: Schema, answer: Schema, *, has_stream: bool = False) -> Schema:
    content: Schema = {"application/json": {"schema": answer}}
    if has_stream:
        content["text/event-stream"] = {"schema": _TEXT}
    return {
        "post": {
            "summary": summary,
            "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
            "responses": _responses(content),
        }
    }


def _got(summary: str, content: Schema, *, is_open: bool = False, **more: Any) -> Schema:
    security: Schema = {"security": []} if is_open else {}
    return {"get": {"summary": summary, "responses": _responses(content), **security, **more}}


def _responses(content: Schema) -> Schema:
    error = {"application/json": {"schema": _ERROR}}
    refused = {status: {"description": text, "content": error} for status, text in _REFUSED.items()}
    return {"200": {"description": "The answer", "content": content}, **refused}


def describe() -> Schema:
    """The whole document."""
    tokens = _body(["tokens"], {"tokens": _list({"type": ["integer", "object"]})})
    json = {"application/json": {"schema": _OBJECT}}
    cards = _body(["object", "data"], {"object": {"const": "list"}, "data": _list(_CARD)})
    status = _body(["status"], {"status": {"enum": ["ok", "loading", "error"]}})
    model = {"name": "model", "in": "path", "required": True, "schema": _TEXT}
    health = _got("Whether it works", {"application/json": {"schema": status}}, is_open=True)
    health["get"]["responses"]["503"]["content"] = {"application/json": {"schema": status}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "qaflora serve", "version": __version__},
        "security": [{"key": []}],
        "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "paths": {
            "/v1/chat/completions": _posted(
                "Answer a conversation", _chat(), _ANSWER, has_stream=True
            ),
            "/v1/completions": _posted(
                "Go on with a text", _completion(), _ANSWER, has_stream=True
            ),
            "/v1/responses": _posted(
                "Answer, in the shape of responses", _response(), _OBJECT, has_stream=True
            ),
            "/v1/weights": _posted(
                "Weigh the adapters for a prompt, or for messages",
                _body(
                    ["model"],
                    {"model": _MODEL, "prompt": _TEXT, "messages": _MESSAGES, "fusion": _FUSION},
                ),
                _WEIGHTS,
            ),
            "/tokenize": _posted(
                "Token ids of a text, or of messages under the chat template",
                _body(
                    [],
                    {
                        "model": _MODEL,
                        "content": _TEXT,
                        "messages": _MESSAGES,
                        "add_special": _FLAG,
                        "parse_special": _FLAG,
                        "with_pieces": _FLAG,
                    },
                ),
                tokens,
            ),
            "/detokenize": _posted(
                "The text of token ids",
                _body(["tokens"], {"model": _MODEL, "tokens": _list(_WHOLE)}),
                _body(["content"], {"content": _TEXT}),
            ),
            "/v1/models": _got("What can be asked", {"application/json": {"schema": cards}}),
            "/v1/models/{model}": _got(
                "One of it", {"application/json": {"schema": _CARD}}, parameters=[model]
            ),
            "/health": health,
            "/metrics": _got("Counters for Prometheus", {"text/plain": {"schema": _TEXT}}),
            "/openapi.json": _got("This document", json),
        },
    }
