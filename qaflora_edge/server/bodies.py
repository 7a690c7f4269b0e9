"""Bodies that no dialect has to itself; and how all are described in OpenAPI.

A field's `title` says what it has to be, in messages too.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct
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


class Error(Struct):
    """Say what failed, in OpenAI's words; Anthropic's have the first two alone."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class Failure(Struct):
    """Answer what failed; Ollama's is a text."""

    error: Error | str


@dataclass(frozen=True)
class Operation:
    """Offer a path: POST with a body, else GET.

    route         its docstring is the summary
    answer        a dict or a list of JSON, or a plain text
    stream_media  the media type of a stream, where an answer may be one
    parameters    names of those in the path or the query
    """

    path: str
    route: Callable[[Request], Any]
    body: type[Body] | None = None
    answer: type = dict
    stream_media: str = ""
    parameters: tuple[str, ...] = ()

    @property
    def method(self) -> str:
        return "GET" if self.body is None else "POST"


def describe(operations: Iterable[Operation]) -> Json:
    """Describe a server in OpenAPI 3.1."""
    paths = {}
    kinds: list[Any] = [Failure]
    for operation in operations:
        path = operation.path.replace(":path", "")
        paths[path] = {operation.method.lower(): _described(path, operation)}
        if operation.body is not None:
            kinds.append(operation.body)
    _, schemas = msgspec.json.schema_components(kinds, ref_template=_REF)
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


_REF = "#/components/schemas/{name}"


def _content(kind: type) -> Json:
    """Describe JSON of a kind that is declared here."""
    ref = _REF.format(name=kind.__name__)
    return {"application/json": {"schema": {"$ref": ref}}}


def _described(path: str, operation: Operation) -> Json:
    media = "text/plain" if operation.answer is str else "application/json"
    content: Json = {media: {"schema": msgspec.json.schema(operation.answer)}}
    if operation.stream_media:
        content[operation.stream_media] = {"schema": {}}
    answer = {"description": "The answer", "content": content}
    failed = {
        "description": "`param` names the field that is wrong; Retry-After when to come again",
        "content": _content(Failure),
    }
    responses = {"200": answer, "4XX": failed, "5XX": failed}
    described: Json = {"summary": operation.route.__doc__, "responses": responses}
    if operation.body is not None:
        described["requestBody"] = {"required": True, "content": _content(operation.body)}
    if operation.parameters:
        described["parameters"] = [_parameter(path, name) for name in operation.parameters]
    if path == "/health":
        responses["503"] = answer
        described["security"] = []
    return described


def _parameter(path: str, name: str) -> Json:
    is_in_path = f"{{{name}}}" in path
    place = "path" if is_in_path else "query"
    return {"name": name, "in": place, "required": is_in_path, "schema": {"type": "string"}}
