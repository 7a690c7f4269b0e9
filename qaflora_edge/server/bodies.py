"""Bodies: what requests have to be; how they are checked, and described in OpenAPI.

The models are the one source of both. A field's `title` says what it has to be, in messages too.
Sampling options come from `config`, with their ranges.
"""

import re
from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args

import msgspec
import msgspec.inspect
from pydantic import (
    BaseModel,
    Field,
    ValidationError,
    create_model,
    model_validator,
)
from pydantic.json_schema import models_json_schema

from qaflora_edge import __version__
from qaflora_edge.bundles import modelfile
from qaflora_edge.config import Option, in_group
from qaflora_edge.dialects.anthropic import TokensBody
from qaflora_edge.dialects.options import MAX_WEIGHT, RANGE
from qaflora_edge.errors import OptionError, wrong_field
from qaflora_edge.formats.bundle import NAME_PATTERN, NAME_RULE
from qaflora_edge.formats.inputs import Json, Object
from qaflora_edge.server.refusals import Refusal

MAX_MESSAGES = 2048
MAX_PROMPTS = 64
MAX_EMBEDDED = 2048  # texts of one request
MAX_TOOLS = 128
MAX_CHOICES = 16  # answers of one request
MAX_STOPS = 16
MAX_TOKENS = 1 << 20  # to detokenize

_WEIGHTS = f'weights {RANGE} by name, as in {{"math": 0.7}}, or [n_adapter][n_layer] numbers'
_SCALES = f'a list such as [{{"id": 0, "scale": 0.5}}] with scales {RANGE}'
_MESSAGE: Json = {
    "type": "object",
    "required": ["role"],
    "properties": {"role": {"type": "string"}, "content": {"type": ["string", "array", "null"]}},
}

Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=0)]
Tokens = Annotated[list[Count], Field(min_length=1, fail_fast=True)]
Several = Annotated[list[Text | Tokens], Field(min_length=1)]
Messages = Annotated[
    list[Json],
    Field(
        min_length=1,
        max_length=MAX_MESSAGES,
        fail_fast=True,
        title=f"a list of messages, {MAX_MESSAGES} at most",
        json_schema_extra={"items": _MESSAGE},
    ),
]
Rows = Annotated[list[list[Any]], Field(fail_fast=True)]
Flag = Annotated[bool | None, Field(title="true or false")]
ToolList = Annotated[
    list[Any] | None, Field(max_length=MAX_TOOLS, title=f"a list of {MAX_TOOLS} tools at most")
]


def unset(title: str, **how: Any) -> Any:
    """Declare a field that may be missing; the title says what it has to be where it is there."""
    return Field(None, title=title, **how)


class Strict(BaseModel, strict=True):
    """Hold an object of a request: values have exactly the types that are declared."""


class Fusion(Strict, extra="forbid"):
    """Say how a request is weighed, and what the answer tells of it."""

    strategy: Text | None = unset("the name of a strategy")
    adapters: list[str] | None = unset("names of adapters", fail_fast=True)
    weights: Json | Rows | None = unset(_WEIGHTS)
    prefill: Literal["auto", "base", "mix"] | None = unset("one of auto, base, mix")
    relay: Flag = None
    returned: Literal["summary", "why", "layers", "none"] | None = unset(
        "one of summary, why, layers, none", alias="return"
    )


class Scale(Strict):
    """Give an adapter a weight, as an entry of llama-server's `lora`."""

    id: int = Field(ge=0)
    scale: float = Field(ge=-MAX_WEIGHT, le=MAX_WEIGHT)


class StreamOptions(Strict):
    """Say what a stream ends with."""

    include_usage: Flag = None


class Body(Strict):
    """Ask a model; a stream of its answer, where it has one, is of some media type."""

    stream_media: ClassVar[str] = ""
    model: str | None = unset("a model that GET /v1/models lists")


class Weighed(Body):
    """Ask for something that is weighed."""

    fusion: Fusion | None = unset('an object, as in {"strategy": "calibrated"}')
    lora: list[Scale] | None = unset(_SCALES, fail_fast=True)


def _option_field(option: Option) -> tuple[Any, Any]:
    """Return an option of `config` as a field of a model; null stands for the default."""
    title = option.expected
    kind: Any
    if option.kind is tuple:
        kind = Text | Annotated[list[Text], Field(max_length=MAX_STOPS, fail_fast=True)]
        title = f"a text or 1 to {MAX_STOPS} texts, none empty"
    elif option.kind is dict:  # the Engine checks its items
        kind = Json
    else:
        above = option.low if option.is_open else None
        least = None if option.is_open else option.low
        kind = Annotated[option.kind, Field(gt=above, ge=least, le=option.high)]
    return kind | None, unset(title, description=option.help)


_OPTIONS = in_group("sampling").values()
_NAMED = {name: option for option in _OPTIONS for name in (option.name, *option.aliases)}
_FIELDS: Json = {name: _option_field(option) for name, option in _NAMED.items()}
Sampled: Any = create_model("Sampled", __base__=Weighed, **_FIELDS)


class Answered(Sampled, extra="allow"):  # type: ignore[misc, call-arg]
    """Ask for answers: how they are sampled, and how they are sent."""

    stream_media = "text/event-stream"
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = unset(
        f"a number of answers from 1 to {MAX_CHOICES}"
    )
    stream: Flag = None
    stream_options: StreamOptions | None = unset('an object, as in {"include_usage": true}')
    return_progress: Flag = None
    json_schema: Json | bool | None = unset("a JSON schema")
    verbose: Flag = None


class Tooled(Answered):
    """Ask for answers that may call tools."""

    tools: ToolList = None
    tool_choice: str | Json | None = None
    parallel_tool_calls: Flag = None


class TemplateBody(Body):
    """Ask /apply-template."""

    messages: Messages
    tools: ToolList = None
    continue_final_message: Flag = None
    add_generation_prompt: Flag = None
    chat_template_kwargs: Json | None = unset('an object, as in {"enable_thinking": false}')


class ChatBody(TemplateBody, Tooled):
    """Ask /v1/chat/completions."""

    logprobs: Flag = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = unset(
        "a number of tokens from 0 to 20"
    )
    response_format: Json | None = unset('an object, as in {"type": "json_object"}')
    reasoning_effort: str | None = unset("a text such as none, low or high")


class TextBody(Answered):
    """Ask /v1/completions."""

    prompt: Text | Tokens | Annotated[Several, Field(max_length=MAX_PROMPTS)] = Field(
        title=f"a text, a list of token ids, or a list of these, {MAX_PROMPTS} at most"
    )


class CompletionBody(Answered):
    """Ask /completion."""

    prompt: Text | Tokens = Field(title="a text or a list of token ids")
    n_predict: Annotated[int, Field(ge=-1)] | None = unset(
        "a number of tokens, or -1 for as many as there is room for"
    )
    n: Literal[1] | None = unset("1: this path gives one answer")


class Extra(Strict):
    """Name another file, and give its text."""

    filename: str = "file"
    text: str = ""


class InfillBody(CompletionBody):
    """Ask /infill."""

    input_prefix: str = Field("", title="the text before the gap")
    input_suffix: str = Field("", title="the text after the gap")
    input_extra: list[Extra] | None = unset(
        'a list such as [{"filename": "a.py", "text": "..."}]', max_length=MAX_PROMPTS
    )
    prompt: str = Field("", title="what the gap begins with")
    n_prompt: Annotated[int, Field(ge=1)] | None = unset("the most tokens of the prompt, 1 or more")
    t_max_predict_ms: Count | None = unset("milliseconds after which the answer ends with its line")


Embedded = Annotated[
    Text | Tokens | Annotated[Several, Field(max_length=MAX_EMBEDDED)],
    Field(title=f"a text, a list of token ids, or a list of these, {MAX_EMBEDDED} at most"),
]


class EmbeddingsBody(Body):
    """Ask /v1/embeddings."""

    input: Embedded
    dimensions: None = unset("nothing: a vector has as many as the base's states")
    encoding_format: Literal["float", "base64"] | None = unset("float or base64")


class ResponsesBody(Tooled):
    """Ask /v1/responses."""

    input: Annotated[str | list[Any], Field(min_length=1)] = Field(
        title="a text or a list of items"
    )
    instructions: str | None = unset("a text")
    max_output_tokens: Count | None = None
    text: Json | None = unset('an object such as {"format": {"type": "text"}}')
    reasoning: Json | None = unset('an object such as {"effort": "low"}')


class WeightsBody(Weighed):
    """Ask /v1/weights."""

    prompt: Text | Tokens | None = unset("a text or token ids")
    messages: Messages | None = None
    raw: Flag = None


class AdapterBody(Body):
    """Ask to add or remove an adapter; config_bytes of an upload are adapter_config.json."""

    lora_name: Annotated[str, Field(pattern=f"^{NAME_PATTERN.pattern}$")] = Field(title=NAME_RULE)
    lora_path: Text | None = unset("a path in the folder of --allow-adapters")
    hub: Text | None = unset("a reference of the Hub, as owner/name")
    config_bytes: Annotated[str, Field(pattern="^[0-9]{1,6}$")] = Field("0", title="a number")


_OF_OLLAMA: Json = {name: _FIELDS[name] for name in modelfile.SAMPLING if name in _FIELDS}
_Options: Any = create_model("_Options", __base__=Strict, **_OF_OLLAMA)


class OllamaOptions(_Options):  # type: ignore[misc]
    """Say how Ollama's clients sample: -1 is what nobody asked for, a whole number may be 3.0."""

    num_predict: int | None = unset(
        "a number of tokens, 0 or less for as many as there is room for"
    )

    @model_validator(mode="before")
    @classmethod
    def _as_ollama(cls, options: Any) -> Any:
        if not isinstance(options, dict):
            return options
        ours: Json = {}
        for name, value in options.items():
            is_whole = isinstance(value, float) and value.is_integer()
            number = int(value) if is_whole else value
            if (name, number) not in (("seed", -1), ("top_k", -1), ("repeat_penalty", 0)):
                ours[name] = number
        if isinstance(ours.get("stop"), list):
            ours["stop"] = [text for text in ours["stop"] if text != ""] or None
        return ours


class OllamaBody(Weighed):
    """Ask in Ollama's shape: sampling options apart, and a stream unless `stream` is false."""

    stream_media = "application/x-ndjson"
    model: Text = Field(title="a model that GET /api/tags lists")
    options: OllamaOptions | None = unset('an object, as in {"temperature": 0}')
    stream: bool = Field(True, title="true or false")
    think: bool | str | None = unset("true, false, or a text such as none or high")
    format: Json | Literal["", "json"] = Field("", title="json, or a JSON schema")
    keep_alive: Any = None
    verbose: Flag = None

    @model_validator(mode="before")
    @classmethod
    def _null_is_unset(cls, body: Any) -> Any:
        is_object = isinstance(body, dict)
        return {k: v for k, v in body.items() if v is not None} if is_object else body


class OllamaChatBody(OllamaBody):
    """Ask /api/chat."""

    messages: Annotated[list[Json], Field(max_length=MAX_MESSAGES, fail_fast=True)] = []
    tools: ToolList = None


class OllamaTextBody(OllamaBody):
    """Ask /api/generate."""

    prompt: str = ""
    suffix: str = ""
    system: str = ""
    raw: Flag = None
    images: list[str] = Field([], title="a list of texts")


class EmbedBody(Body):
    """Ask /api/embed."""

    input: Text | Annotated[list[Text], Field(max_length=MAX_EMBEDDED)] = Field(
        title=f"a text, or a list of {MAX_EMBEDDED} texts at most"
    )


class OldEmbedBody(Body):
    """Ask /api/embeddings."""

    prompt: str = Field(title="a text")


class ShowBody(Body):
    """Ask /api/show; `name` is the old name of `model`."""

    name: str | None = None


class TokenizeBody(Body):
    """Ask /tokenize."""

    content: str = Field(title="a text")
    add_special: Flag = None
    parse_special: Flag = None


class DetokenizeBody(Body):
    """Ask /detokenize."""

    tokens: list[int] = Field(
        max_length=MAX_TOKENS, fail_fast=True, title=f"a list of {MAX_TOKENS} token ids at most"
    )


AnyBody = Body | TokensBody


def as_mapping(body: AnyBody) -> Json:
    """Give the fields that a body has, as dialects read them; null stands for nothing."""
    if isinstance(body, Body):
        return body.model_dump(exclude_none=True)
    fields: Json = msgspec.to_builtins(body)
    weighed = checked(Weighed, {"fusion": fields.pop("fusion", None)})
    return fields | weighed.model_dump(exclude_none=True)


B = TypeVar("B", bound=AnyBody)


def checked(kind: type[B], fields: Json) -> B:
    """Return the body that has these fields. Raises OptionError, or Refusal for an unknown one."""
    if issubclass(kind, TokensBody):
        return _converted(kind, fields)
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        raise _refusal(kind, first, fields) from None


def _refusal(kind: type[BaseModel] | None, error: Object, value: Any) -> Refusal | OptionError:
    names = []
    expected = ""
    for key in error["loc"]:
        if kind is None:
            break
        fields = {field.alias or name: field for name, field in kind.model_fields.items()}
        value = value.get(key) if isinstance(value, dict) else None
        names.append(f"{key:.80}")
        if key not in fields:
            name = ".".join(names)
            expected = ", ".join(fields)
            message = f"The field {name} does not exist, expected one of {expected}."
            return Refusal(400, message, param=name, code="unknown_field")
        field = fields[key]
        expected = field.title or error["msg"].removeprefix("Input should be ")
        parts = get_args(field.annotation)
        models = (part for part in parts if isinstance(part, type) and issubclass(part, BaseModel))
        kind = next(models, None)  # of what is in it
    if error["type"] == "value_error":
        expected = error["msg"].removeprefix("Value error, ")
    return wrong_field(".".join(names), value, expected)


# What msgspec says of a value: what is wrong, and at which path.
_WRONG = re.compile(r"(?P<what>.*?)(?:, got .*?)?(?: - at `\$\.?(?P<path>.*)`)?", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(.*)`")
_KEY = re.compile(r"[^].[]+")


def _converted(kind: type[B], fields: Json) -> B:
    try:
        return msgspec.convert(fields, kind)
    except msgspec.ValidationError as error:
        match = _WRONG.fullmatch(str(error))
        assert match is not None
        what = match["what"]
        path = match["path"] or ""
        if missing := _MISSING.fullmatch(what):
            path = f"{path}.{missing[1]}".removeprefix(".")
        value: Any = fields
        for key in _KEY.findall(path):
            value = value[int(key)] if isinstance(value, list) else value.get(key)
        expected = _values_at(msgspec.inspect.type_info(kind), path)
        raise wrong_field(path, value, expected or what.removeprefix("Expected ")) from None


def _values_at(node: msgspec.inspect.Type, path: str) -> str:
    """List the values that a place may have; "" where they are too many."""
    for key in _KEY.findall(path):
        members = getattr(node, "types", (node,))
        structs = [member for member in members if isinstance(member, msgspec.inspect.StructType)]
        fields = {field.encode_name: field.type for struct in structs for field in struct.fields}
        if key in fields:
            node = fields[key]
        elif key.isdecimal():
            node = next(member.item_type for member in members if hasattr(member, "item_type"))
        else:
            return "one of " + ", ".join(str(struct.tag) for struct in structs)
        node = getattr(node, "type", node)  # without its limits
    values: list[str] = []
    for member in getattr(node, "types", (node,)):
        values += getattr(member, "values", ())
    return "one of " + ", ".join(values) if values else ""


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
_FAILURE = {"properties": {"error": {"anyOf": [_ERROR, {"type": "string"}]}}}  # Ollama's is a text
_FAILED = {
    "description": "`param` names the field that is wrong; Retry-After when to come again",
    "content": {"application/json": {"schema": _FAILURE}},
}


def describe(paths: Iterable[tuple[str, str, type[AnyBody] | None]]) -> Json:
    """Describe a server in OpenAPI 3.1.

    paths  (path, summary, body, or None for GET)
    """
    operations = {}
    kinds: list[Any] = []
    structs: list[Any] = []
    for path, summary, kind in paths:
        if kind is None:
            operations[path] = {"get": _read(path, summary)}
        else:
            operations[path] = {"post": _asked(path, summary, kind)}
            if issubclass(kind, Body):
                kinds.append((kind, "validation"))
            else:
                structs.append(kind)
    _, described = models_json_schema(kinds, ref_template="#/components/schemas/{model}")
    _, more = msgspec.json.schema_components(structs, ref_template="#/components/schemas/{name}")
    keys = {
        "key": {"type": "http", "scheme": "bearer"},
        "x_api_key": {"type": "apiKey", "in": "header", "name": "X-Api-Key"},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "qaflora serve", "version": __version__},
        "security": [{name: []} for name in keys],
        "components": {"schemas": described["$defs"] | more, "securitySchemes": keys},
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


def _asked(path: str, summary: str, kind: type[AnyBody]) -> Json:
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
