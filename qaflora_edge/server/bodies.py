"""Bodies that no dialect has to itself; and how all are described in OpenAPI.

A field's `title` says what it has to be, in messages too.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta
from starlette.requests import Request

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


@dataclass(frozen=True)
class Operation:
    """Offer a path: POST with a body, else GET.

    route         its docstring is the summary
    stream_media  the media type of a stream, where an answer may be one
    """

    path: str
    route: Callable[[Request], Any]
    body: type[Body] | None = None
    stream_media: str = ""

    @property
    def method(self) -> str:
        return "GET" if self.body is None else "POST"


def describe(operations: Iterable[Operation]) -> Json:
    """Describe a server in OpenAPI 3.1."""
    paths = {}
    kinds: list[Any] = []
    for operation in operations:
        path = operation.path.replace(":path", "")
        paths[path] = {operation.method.lower(): _described(path, operation)}
        if operation.body is not None:
            kinds.append(operation.body)
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
        "paths": paths,
    }


def _described(path: str, operation: Operation) -> Json:
    media = "application/json"
    schema = {"type": "array" if path == "/lora-adapters" else "object"}
    if path == "/metrics" or path.endswith("load_lora_adapter"):
        media = "text/plain"
        schema = {"type": "string"}
    content: Json = {media: {"schema": schema}}
    if operation.stream_media:
        content[operation.stream_media] = {"schema": {}}
    answer = {"description": "The answer", "content": content}
    responses = {"200": answer, "4XX": _FAILED, "5XX": _FAILED}
    described: Json = {"summary": operation.route.__doc__, "responses": responses}
    if operation.body is not None:
        ref = {"$ref": f"#/components/schemas/{operation.body.__name__}"}
        body = {"application/json": {"schema": ref}}
        described["requestBody"] = {"required": True, "content": body}
    model: Json = {"name": "model", "in": "query", "schema": {"type": "string"}}
    if path == "/health":
        responses["503"] = answer
        described["security"] = []
    elif "{model}" in path:
        described["parameters"] = [model | {"in": "path", "required": True}]
    elif path in ("/lora-adapters", "/props"):
        described["parameters"] = [model]
    return described
