"""What bodies of requests share: types of fields, who is weighed, how tokens are chosen.

A body is a typed struct, declared in its dialect. A title says what a field has to be, in messages
and in OpenAPI. Sampling options come from `config`, with their ranges. null stands for nothing.
"""

from typing import Annotated, Any, ClassVar, Literal

from msgspec import Meta, Struct, defstruct, field

from qaflora_edge.config import Option, in_group
from qaflora_edge.formats.inputs import Json

MAX_MESSAGES = 2048
MAX_PROMPTS = 64
MAX_TOOLS = 128
MAX_CHOICES = 16  # answers of one request
MAX_STOPS = 16
MAX_WEIGHT = 100.0  # of a request, up or down: states overflow at some number beyond
RANGE = f"from {-MAX_WEIGHT:g} to {MAX_WEIGHT:g}"

Text = Annotated[str, Meta(title="a text that is not empty", min_length=1)]
Count = Annotated[int, Meta(title="a whole number from 0 up", ge=0)]
Tokens = Annotated[list[Count], Meta(min_length=1)]
Prompts = str | Annotated[list[Text | Count | Tokens], Meta(min_length=1)]
Flag = bool | None
_MESSAGE: Json = {
    "type": "object",
    "required": ["role"],
    "properties": {"role": {"type": "string"}, "content": {"type": ["string", "array", "null"]}},
}
MessageList = Annotated[
    list[Json], Meta(max_length=MAX_MESSAGES, extra_json_schema={"items": _MESSAGE})
]
Messages = Annotated[
    MessageList, Meta(min_length=1, title=f"a list of messages, {MAX_MESSAGES} at most")
]
ToolList = Annotated[
    Annotated[list[Any], Meta(max_length=MAX_TOOLS)] | None,
    Meta(title=f"a list of {MAX_TOOLS} tools at most"),
]
Variables = Annotated[Json | None, Meta(title='an object, as in {"enable_thinking": false}')]


class Body(Struct, frozen=True, kw_only=True):
    """Ask a model; a stream of its answer, where it has one, is of some media type."""

    stream_media: ClassVar[str] = ""
    model: Annotated[str | None, Meta(title="a model that GET /v1/models lists")] = None

    @property
    def is_stream(self) -> bool:
        return False


class Fusion(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Say how a request is weighed, and what the answer tells of it."""

    strategy: Annotated[Text | None, Meta(title="the name of a strategy")] = None
    adapters: Annotated[list[str] | None, Meta(title="names of adapters")] = None
    weights: Annotated[
        Json | list[list[Any]] | None,
        Meta(
            title=f'weights {RANGE} by name, as in {{"math": 0.7}}, or [n_adapter][n_layer] numbers'
        ),
    ] = None
    prefill: Literal["auto", "base", "mix"] | None = None
    relay: Flag = None
    returned: Annotated[
        Literal["summary", "why", "layers", "none"] | None,
        Meta(title="one of summary, why, layers, none"),
    ] = field(default=None, name="return")


class Scale(Struct, frozen=True):
    """Give an adapter a weight, as an entry of llama-server's `lora`."""

    id: Count
    scale: Annotated[float, Meta(ge=-MAX_WEIGHT, le=MAX_WEIGHT)]


class Weighed(Body, frozen=True, kw_only=True):
    """Ask for something that is weighed."""

    fusion: Annotated[Fusion | None, Meta(title='an object, as in {"strategy": "calibrated"}')] = (
        None
    )
    lora: Annotated[
        list[Scale] | None,
        Meta(title=f'a list such as [{{"id": 0, "scale": 0.5}}] with scales {RANGE}'),
    ] = None
    verbose: Flag = None

    @property
    def effort(self) -> str | bool | None:
        """How long the base is asked to think, where a body says it."""
        return None


class StreamOptions(Struct, frozen=True):
    """Say what a stream ends with."""

    include_usage: Flag = None


def option_field(name: str, option: Option) -> tuple[str, Any, None]:
    """Declare an option of `config` as a field; null stands for the default."""
    title = option.expected
    kind: Any
    if option.kind is tuple:
        kind = Text | Annotated[list[Text], Meta(min_length=1, max_length=MAX_STOPS)]
        title = f"a text or 1 to {MAX_STOPS} texts, none empty"
    elif option.kind is dict:  # the Engine checks its items
        kind = Json
    else:
        limits = {"gt" if option.is_open else "ge": option.low, "le": option.high}
        kind = Annotated[option.kind, Meta(**{k: v for k, v in limits.items() if v is not None})]
    return name, Annotated[kind | None, Meta(title=title, description=option.help)], None


_OPTIONS = in_group("sampling").values()
_NAMED = {name: option for option in _OPTIONS for name in (option.name, *option.aliases)}
Sampled: Any = defstruct(
    "Sampled",
    [option_field(name, option) for name, option in _NAMED.items()],
    bases=(Weighed,),
    frozen=True,
    kw_only=True,
)


class Answered(Sampled, frozen=True, kw_only=True):  # type: ignore[misc, call-arg]
    """Ask for answers: how they are sampled, and how they are sent.

    The last six are checked by options.FIXED.
    """

    stream_media = "text/event-stream"
    n: Annotated[
        Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None,
        Meta(title=f"a number of answers from 1 to {MAX_CHOICES}"),
    ] = None
    stream: Flag = None
    stream_options: Annotated[
        StreamOptions | None, Meta(title='an object, as in {"include_usage": true}')
    ] = None
    return_progress: Flag = None
    json_schema: Annotated[Json | bool | None, Meta(title="a JSON schema")] = None
    functions: Any = None
    audio: Any = None
    suffix: Any = None
    echo: Any = None
    modalities: Any = None
    reasoning_format: Any = None

    @property
    def is_stream(self) -> bool:
        return bool(self.stream)


class Tooled(Answered, frozen=True, kw_only=True):
    """Ask for answers that may call tools."""

    tools: ToolList = None
    tool_choice: str | Json | None = None
    parallel_tool_calls: Flag = None
