"""Bodies that no dialect has to itself; and how all are described in OpenAPI.

A field's `title` says what it has to be, in messages too.
"""

from collections.abc import Iterable
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from qaflora_edge import __version__
from qaflora_edge.dialects.options import Body, Flag, Messages, Prompts, Text, Tokens, Weighed
from qaflora_edge.formats.bundle import Name
from qaflora_edge.formats.inputs import Json

MAX_EMBEDDED = 2048  # texts of one request
MAX_TOKENS = 1 << 20  # to detokenize


class EmbeddingsBody(Body, frozen=True, kw_only=True):
    """Ask /v1/embeddings."""

    input: Annotated[
        Prompts,
        Meta(title=f"a text, a list of token ids, or a list of these, {MAX_EMBEDDED} at most"),
    ]
    dimensions: Annotated[
        None, Meta(title="nothing: a vector has as many as the base's states")
    ] = None
    encoding_format: Annotated[Literal["float", "base64"] | None, Meta(title="float or base64")] = (
        None
    )


class WeightsBody(Weighed, frozen=True, kw_only=True):
    """Ask /v1/weights."""

    prompt: Annotated[Text | Tokens | None, Meta(title="a text or token ids")] = None
    messages: Messages | None = None
    raw: Flag = None


class TeachBody(Body, frozen=True, kw_only=True):
    """Say whose question one is, or take the last such word back."""

    messages: Messages | None = None
    adapter: Annotated[Text | None, Meta(title="the name of an adapter, or base")] = None
    undo: Flag = None


class AdapterBody(Body, frozen=True, kw_only=True):
    """Ask to add or remove an adapter; config_bytes of an upload are adapter_config.json."""

    lora_name: Name
    lora_path: Annotated[Text | None, Meta(title="a path in the folder of --allow-adapters")] = None
    hub: Annotated[Text | None, Meta(title="a reference of the Hub, as owner/name")] = None
    config_bytes: Annotated[str, Meta(title="a number", pattern="^[0-9]{1,6}$")] = "0"


class EmbedBody(Body, frozen=True, kw_only=True):
    """Ask /api/embed."""

    input: Annotated[
        Text | Annotated[list[Text], Meta(max_length=MAX_EMBEDDED)],
        Meta(title=f"a text, or a list of {MAX_EMBEDDED} texts at most"),
    ]


class ShowBody(Body, frozen=True, kw_only=True):
    """Ask /api/show; `name` is the old name of `model`."""

    name: str | None = None


class TokenizeBody(Body, frozen=True, kw_only=True):
    """Ask /tokenize."""

    content: str
    add_special: Flag = None
    parse_special: Flag = None


class DetokenizeBody(Body, frozen=True, kw_only=True):
    """Ask /detokenize."""

    tokens: Annotated[
        list[int], Meta(max_length=MAX_TOKENS, title=f"a list of {MAX_TOKENS} token ids at most")
    ]


_TEXT_OR_NULL = {"type": ["string", "null"]}
_ERROR = {  # as OpenAI words it
    "type": "object",
    "required": ["message", "type", "param", "code"],
    "properties": {
        "message": {"type": "string"},
        "type": {"type": "string"},
        "param": _TEXT_OR_NULL,
        "code": _TEXT_OR_NULL,
    },
}
# Anthropic's has two fields, Ollama's is a text.
_ERROR_OF_MESSAGES = {
    "type": "object",
    "required": ["message", "type"],
    "properties": {"message": {"type": "string"}, "type": {"type": "string"}},
}
_FAILURE = {"properties": {"error": {"anyOf": [_ERROR, _ERROR_OF_MESSAGES, {"type": "string"}]}}}
_FAILED = {
    "description": "`param` names the field that is wrong; Retry-After when to come again",
    "content": {"application/json": {"schema": _FAILURE}},
}


def describe(paths: Iterable[tuple[str, str, type[Body] | None]]) -> Json:
    """Describe a server in OpenAPI 3.1.

    paths  (path, summary, body, or None for GET)
    """
    operations = {}
    kinds: list[Any] = []
    for path, summary, kind in paths:
        if kind is None:
            operations[path] = {"get": _read(path, summary)}
        else:
            operations[path] = {"post": _asked(path, summary, kind)}
            kinds.append(kind)
    _, schemas = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    keys = {
        "key": {"type": "http", "scheme": "bearer"},
        "x_api_key": {"type": "apiKey", "in": "header", "name": "X-Api-Key"},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "qaflora serve", "version": __version__},
        "security": [{name: []} for name in keys],
        "components": {"schemas": schemas, "securitySchemes": keys},
        "paths": operations,
    }


def _operation(path: str, summary: str, stream_media: str = "") -> Json:
    media = "application/json"
    schema = {"type": "array" if path == "/lora-adapters" else "object"}
    if path == "/metrics" or path.endswith("load_lora_adapter"):
        media = "text/plain"
        schema = {"type": "string"}
    content: Json = {media: {"schema": schema}}
    if stream_media:
        content[stream_media] = {"schema": {}}
    answer = {"description": "The answer", "content": content}
    return {"summary": summary, "responses": {"200": answer, "4XX": _FAILED, "5XX": _FAILED}}


def _asked(path: str, summary: str, kind: type[Body]) -> Json:
    operation = _operation(path, summary, kind.stream_media)
    schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
    content = {"application/json": {"schema": schema}}
    operation["requestBody"] = {"required": True, "content": content}
    return operation


def _read(path: str, summary: str) -> Json:
    operation = _operation(path, summary)
    model: Json = {"name": "model", "in": "query", "schema": {"type": "string"}}
    if path == "/health":
        responses = operation["responses"]
        responses["503"] = responses["200"]
        operation["security"] = []
    elif "{model}" in path:
        operation["parameters"] = [model | {"in": "path", "required": True}]
    elif path in ("/lora-adapters", "/props"):
        operation["parameters"] = [model]
    return operation
