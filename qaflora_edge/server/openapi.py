"""The description of the server's paths, in OpenAPI 3.1; the options come from `config`."""

from collections.abc import Iterable
from typing import Any

from qaflora_edge import __version__
from qaflora_edge.config import Option, in_group
from qaflora_edge.server.fields import RETURNS
from qaflora_edge.server.options import (
    MAX_CHOICES,
    MAX_MESSAGES,
    MAX_PROMPTS,
    MAX_STOPS,
    MAX_TOOLS,
    MAX_WEIGHT,
)

Schema = dict[str, Any]
_TEXT: Schema = {"type": "string"}
_FLAG: Schema = {"type": ["boolean", "null"]}
_OBJECT: Schema = {"type": "object"}
_WHOLE: Schema = {"type": "integer"}
_TOKEN: Schema = {"type": "integer", "minimum": 0}
_PROMPT: Schema = {"type": "string", "minLength": 1}
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


def _either(text: str, more: Schema, required: Iterable[str] = ()) -> Schema:
    """A text, or else messages."""
    alone = _body([*required, text], {**more, text: _PROMPT if text == "prompt" else _TEXT})
    return {"anyOf": [alone, _body([*required, "messages"], {**more, "messages": _MESSAGES})]}


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


_WEIGHT: Schema = {"type": "number", "minimum": -MAX_WEIGHT, "maximum": MAX_WEIGHT}
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
                    {"type": "object", "additionalProperties": _WEIGHT},
                    _list(_list(_WEIGHT)),
                    {"type": "null"},
                ]
            },
            "return": {"enum": [*RETURNS, None]},
        },
    }
)
_SCALE = _body(["id", "scale"], {"id": _TOKEN, "scale": _WEIGHT})
_PART = _body(["type", "text"], {"type": {"const": "text"}, "text": _TEXT})
_CONTENT = {"anyOf": [_TEXT, _list(_PART, minItems=1)]}
_CALLED = _body(["name"], {"name": _TEXT, "arguments": {"type": ["string", "object"]}})
_CALLS = _list(_body(["function"], {"function": _CALLED}), minItems=1)
_MESSAGE = {
    "anyOf": [
        _body(["role", "content"], {"role": _TEXT, "content": _CONTENT}),
        _body(["role", "tool_calls"], {"role": {"const": "assistant"}, "tool_calls": _CALLS}),
    ]
}
_MESSAGES = _list(_MESSAGE, minItems=1, maxItems=MAX_MESSAGES)
_USAGE_OPTIONS = _or_null(_body([], {"include_usage": _FLAG}))
_ANSWERED = {
    "n": {"type": ["integer", "null"], "minimum": 1, "maximum": MAX_CHOICES},
    "stream": _FLAG,
    "stream_options": _USAGE_OPTIONS,
    "return_progress": _FLAG,
    "fusion": _FUSION,
    "lora": _or_null(_list(_SCALE)),
}
_SCHEMA = _body(["schema"], {"name": _TEXT, "schema": _OBJECT})
_FORMATS = [
    _body(["type"], {"type": {"enum": ["text", "json_object"]}}),
    _body(["type", "json_schema"], {"type": {"const": "json_schema"}, "json_schema": _SCHEMA}),
]
_FUNCTION = _body(["name"], {"name": _TEXT, "parameters": _OBJECT})
_TOOL = _body(["type", "function"], {"type": {"const": "function"}, "function": _FUNCTION})


def _chat(model: Schema) -> Schema:
    return _body(
        ["model", "messages"],
        {
            **_sampling(),
            "model": model,
            **_ANSWERED,
            "messages": _MESSAGES,
            "logprobs": _FLAG,
            "top_logprobs": {"type": ["integer", "null"], "minimum": 0, "maximum": 20},
            "tools": _or_null(_list(_TOOL, maxItems=MAX_TOOLS)),
            "tool_choice": {"type": ["string", "object", "null"]},
            "parallel_tool_calls": _FLAG,
            "response_format": _or_null({"anyOf": _FORMATS}),
        },
    )


def _completion(model: Schema) -> Schema:
    tokens = _list(_TOKEN, minItems=1)
    lists = [_list(each, minItems=1, maxItems=MAX_PROMPTS) for each in (_PROMPT, tokens)]
    prompts = [_PROMPT, tokens, *lists]
    own = {"model": model, "prompt": {"anyOf": prompts}, "echo": _FLAG}
    return _body(["model", "prompt"], {**_sampling(), **_ANSWERED, **own})


def _response(model: Schema) -> Schema:
    return _body(
        ["model", "input"],
        {
            "model": model,
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
        content["text/event-stream"] = {"schema": {}}
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


def describe(models: Iterable[str]) -> Schema:
    """The whole document of a server that has these models."""
    model: Schema = {"type": "string", "description": "The model.", "enum": list(models)}
    tokens = _body(["tokens"], {"tokens": _list({"type": ["integer", "object"]})})
    json = {"application/json": {"schema": _OBJECT}}
    flags = {name: _FLAG for name in ("add_special", "parse_special", "with_pieces")}
    cards = _body(["object", "data"], {"object": {"const": "list"}, "data": _list(_CARD)})
    status = _body(["status"], {"status": {"enum": ["ok", "loading", "error"]}})
    named = {"name": "model", "in": "path", "required": True, "schema": model}
    health = _got("Whether it works", {"application/json": {"schema": status}}, is_open=True)
    health["get"]["responses"]["503"]["content"] = {"application/json": {"schema": status}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "qaflora serve", "version": __version__},
        "security": [{"key": []}],
        "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "paths": {
            "/v1/chat/completions": _posted(
                "Answer a conversation", _chat(model), _ANSWER, has_stream=True
            ),
            "/v1/completions": _posted(
                "Go on with a text", _completion(model), _ANSWER, has_stream=True
            ),
            "/v1/responses": _posted(
                "Answer, in the shape of responses", _response(model), _OBJECT, has_stream=True
            ),
            "/v1/weights": _posted(
                "Weigh the adapters for a prompt, or for messages",
                _either("prompt", {"model": model, "fusion": _FUSION}, ["model"]),
                _WEIGHTS,
            ),
            "/tokenize": _posted(
                "Token ids of a text, or of messages under the chat template",
                _either("content", {"model": model, **flags}),
                tokens,
            ),
            "/detokenize": _posted(
                "The text of token ids",
                _body(["tokens"], {"model": model, "tokens": _list(_TOKEN)}),
                _body(["content"], {"content": _TEXT}),
            ),
            "/v1/models": _got("What can be asked", {"application/json": {"schema": cards}}),
            "/v1/models/{model}": _got(
                "One of it", {"application/json": {"schema": _CARD}}, parameters=[named]
            ),
            "/health": health,
            "/metrics": _got("Counters for Prometheus", {"text/plain": {"schema": _TEXT}}),
            "/openapi.json": _got("This document", json),
        },
    }
