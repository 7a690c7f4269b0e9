"""What bodies of requests share: types of fields, who is weighed, how tokens are chosen, tools.

A body is a typed struct, declared in its dialect. A title says what a field has to be, in messages
and in OpenAPI. Sampling options come from `config`, with their ranges. null stands for nothing.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct, defstruct, field

from qaflora_edge.ask import Sampling, Tools, Weighing
from qaflora_edge.config import Option, in_group
from qaflora_edge.errors import OptionError, wrong_field, wrong_option
from qaflora_edge.formats.inputs import Json, UnknownField, WrongField, read_as
from qaflora_edge.weighing.strategy import parse_strategy

MAX_MESSAGES = 2048
MAX_PROMPTS = 64
MAX_TOOLS = 128
MAX_CHOICES = 16  # answers of one request
MAX_STOPS = 16
MAX_WEIGHT = 100.0  # of a request, up or down: states overflow at some number beyond
RANGE = f"from {-MAX_WEIGHT:g} to {MAX_WEIGHT:g}"

# Of OpenAI's chat completions: the answer is right without.
UNUSED = frozenset(
    {"model", "user", "store", "metadata", "service_tier", "safety_identifier"}
    | {"prompt_cache_key", "prompt_cache_retention", "prediction"}
    | {"verbosity", "web_search_options", "best_of", "function_call"}
)
# The answer would be wrong without: each has to be off, or at one of these values.
FIXED: dict[str, tuple[Any, ...]] = {
    "functions": (),
    "audio": (),
    "suffix": (),  # this and the next one are of texts
    "echo": (),
    "modalities": (["text"],),
    "reasoning_format": ("auto", "deepseek"),  # llama-server's: thoughts are kept apart
}
ALIASES = {
    alias: option.name for option in in_group("sampling").values() for alias in option.aliases
}
# Field -> option; `logprobs` is another one here.
SAMPLING = {name: name for name in in_group("sampling") if name != "logprobs"} | ALIASES
_NO_THOUGHT = ("none", "minimal")

Text = Annotated[str, Meta(title="a text that is not empty", min_length=1)]
Count = Annotated[int, Meta(title="a whole number from 0 up", ge=0)]
Tokens = Annotated[list[Count], Meta(min_length=1)]
NTop = Annotated[int, Meta(title="a number of tokens from 0 to 20", ge=0, le=20)]
OnePrompt = Annotated[Text | Count | Tokens, Meta(title="a text, a token id, or a list of ids")]
Prompts = Text | Annotated[list[OnePrompt], Meta(min_length=1)]
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
ToolList = (
    Annotated[list[Any], Meta(title=f"a list of {MAX_TOOLS} tools at most", max_length=MAX_TOOLS)]
    | None
)


class Body(Struct, frozen=True, kw_only=True):
    """Ask a model."""

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
    draft: Flag = None
    returned: Annotated[
        Literal["summary", "why", "layers", "none"] | None,
        Meta(title="one of summary, why, layers, none"),
    ] = field(default=None, name="return")


class Scale(Struct, frozen=True):
    """Give an adapter a weight, as an entry of llama-server's `lora`."""

    id: Count
    scale: Annotated[float, Meta(title=f"a number {RANGE}", ge=-MAX_WEIGHT, le=MAX_WEIGHT)]


class Weighed(Body, frozen=True, kw_only=True):
    """Ask for something that is weighed."""

    fusion: Annotated[Fusion | None, Meta(title='an object, as in {"strategy": "calibrated"}')] = (
        None
    )
    lora: Annotated[
        list[Scale] | None,
        Meta(title=f'a list such as [{{"id": 0, "scale": 0.5}}] with scales {RANGE}'),
    ] = None

    @property
    def effort(self) -> str | bool | None:
        """How long the base is asked to think, where a body says it."""
        return None

    @property
    def is_unload(self) -> bool:
        """Whether a body that asks nothing wants the model closed, where it may say so."""
        return False


class StreamedBody(Weighed, frozen=True, kw_only=True):
    """Ask for what may come as a stream."""

    stream: Flag = None

    @property
    def is_stream(self) -> bool:
        return bool(self.stream)


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
        given: Json = {name: limit for name, limit in limits.items() if limit is not None}
        kind = Annotated[option.kind, Meta(**given)]
    return name, Annotated[kind | None, Meta(title=title, description=option.help)], None


if TYPE_CHECKING:
    Sampled = StreamedBody  # sampling_of and check_off read its fields by their names
else:
    _OPTIONS = in_group("sampling")
    Sampled = defstruct(
        "Sampled",
        [
            *(option_field(name, _OPTIONS[option]) for name, option in SAMPLING.items()),
            *((name, Any, None) for name in FIXED),
        ],
        bases=(StreamedBody,),
        frozen=True,
        kw_only=True,
    )


class Answered(Sampled, frozen=True, kw_only=True):
    """Ask for answers: how they are sampled, and how they are sent."""

    n: (
        Annotated[
            int, Meta(title=f"a number of answers from 1 to {MAX_CHOICES}", ge=1, le=MAX_CHOICES)
        ]
        | None
    ) = None
    stream_options: Annotated[
        StreamOptions | None, Meta(title='an object, as in {"include_usage": true}')
    ] = None
    return_progress: Flag = None
    json_schema: Annotated[Json | bool | None, Meta(title="a JSON schema")] = None


class Tooled(Answered, frozen=True, kw_only=True):
    """Ask for answers that may call tools."""

    tools: ToolList = None
    tool_choice: str | Json | None = None
    parallel_tool_calls: Flag = None


T = TypeVar("T")


def read_body(kind: type[T], fields: object, place: str = "") -> T:
    """Read a body, or the part of it at a place.

    Raises UnknownField for a field that does not exist, where that matters, else OptionError.
    """
    try:
        return read_as(kind, fields, place)
    except UnknownField:
        raise
    except WrongField as error:
        raise wrong_field(error.place, error.value, error.expected) from None


def sampling_of(body: Body, defaults: Sampling, **more: Any) -> Sampling:
    """Read how tokens are chosen; the defaults hold where a body says nothing, or null.

    more  options that a body says in another way; None: nothing

    Of two names of one option OpenAI's newer one counts.
    """
    options = {}
    for name, option in SAMPLING.items():
        if getattr(body, name) is not None:
            options[option] = getattr(body, name)
    return defaults.updated(options | said(more))


def said(options: Json) -> Json:
    """Give the options that a body says something of: None is nothing."""
    return {name: value for name, value in options.items() if value is not None}


def n_logprob(is_wanted: Any, n_top: Any) -> int | None:
    """Return OpenAI's `logprobs` and `top_logprobs` as one option; the second implies the first."""
    if not isinstance(is_wanted, bool | None):
        raise wrong_option("logprobs", is_wanted, "true or false")
    option = in_group("sampling")["logprobs"]
    if n_top is not None and not option.fits(n_top):
        raise wrong_option("top_logprobs", n_top, option.expected)
    if not is_wanted and not n_top:
        return None
    return n_top or 0


def check_off(method: str, body: Body, fixed: Mapping[str, tuple[Any, ...]]) -> None:
    """Raise OptionError for an option of `fixed` that asks for something which cannot be done.

    An option is off when it is None, False, 0, -1 or empty, or has a value of `fixed`.
    """
    for name, harmless in fixed.items():
        value = getattr(body, name)
        if value and value not in (-1, *harmless):
            raise OptionError(
                f"Option {name} of {method} is {value!r:.200}, expected nothing: it cannot be "
                "followed here. Leave it out.",
                name,
            )


def wants_thoughts(effort: str | bool | None) -> bool:
    """Tell whether an effort, as thinking() takes it, asks for thoughts; None does not."""
    return effort not in (*_NO_THOUGHT, False, None)


def thinking(effort: str | bool | None) -> Json | None:
    """Return an effort as variables of chat templates; bases that do not think read none.

    effort  OpenAI's `reasoning_effort` or Ollama's `think`: "none", "minimal" and False ask for no
            thought, all else for one; None asks for nothing
    """
    if effort is None:
        return None
    if not isinstance(effort, str | bool):
        raise wrong_option("reasoning_effort", effort, "a text such as none, low or high")
    is_wanted = wants_thoughts(effort)
    variables: Json = {"enable_thinking": is_wanted, "thinking": is_wanted}
    if is_wanted and isinstance(effort, str):
        variables["reasoning_effort"] = effort  # gpt-oss reads it
    return variables


def chosen_tools(tools: Any, tool_choice: Any, is_parallel: bool | None = None) -> Tools | None:
    """Check the tools that the base is told of; find those of which it has to call one.

    tool_choice  None, "auto", "none", "required", or {"type": "function", "function": {"name": N}}
    is_parallel  False: only the first call of an answer counts
    """
    checked = [_checked(tool) for tool in tools or ()]
    required: list[Json] = []
    if tool_choice == "none":
        checked = []
    elif tool_choice == "required" and checked:
        required = checked
    elif tool_choice not in (None, "auto"):
        required = [_named(checked, tool_choice)]
    return Tools(checked, required, is_parallel is False) if checked else None


def _named(tools: Sequence[Json], tool_choice: Any) -> Json:
    function = _function(tool_choice)
    name = function.get("name") if isinstance(function, Mapping) else None
    names = [tool["function"]["name"] for tool in tools]
    if name in names:
        return tools[names.index(name)]
    form = "{'type': 'function', 'function': {'name': ...}}"
    listed = ", ".join(names) or "none is given"
    expected = f"auto, none, required, or {form} with a name out of: {listed}"
    raise wrong_option("tool_choice", tool_choice, expected)


def _checked(tool: Any) -> Json:
    function = _function(tool)
    if isinstance(function, Mapping):
        function = {name: value for name, value in function.items() if value is not None}
        has_name = isinstance(function.get("name"), str)
        if has_name and isinstance(function.get("parameters", {}), Mapping):
            return {"type": "function", "function": function}
    raise OptionError(
        f"Option tools has {tool!r:.200}, expected {{'type': 'function', 'function': "
        "{'name': ..., 'description': ..., 'parameters': a JSON schema}}.",
        "tools",
    )


def _function(tool: Any) -> Any:
    if not isinstance(tool, Mapping) or tool.get("type", "function") != "function":
        return None
    flat = {name: value for name, value in tool.items() if name not in ("type", "strict")}
    return tool.get("function", flat)


def weighing_of(body: Weighed, of_model: str | None, adapters: Sequence[str]) -> Weighing:
    """Combine the fields `fusion` and `lora` with the strategy that the model id names."""
    fusion = body.fusion or Fusion()
    weights = fusion.weights
    field = "fusion.weights"
    if body.lora is not None:
        if weights is not None or any(scale.id >= len(adapters) for scale in body.lora):
            expected = f"ids below {len(adapters)}, and no fusion.weights"
            raise wrong_field("lora", msgspec.to_builtins(body.lora), expected)
        weights = {adapters[scale.id]: scale.scale for scale in body.lora}
        field = "lora"
    strategy = fusion.strategy or of_model
    if of_model not in (None, strategy):
        expected = f"{of_model}, as the model says, or nothing"
        raise wrong_field("fusion.strategy", strategy, expected)
    if weights is not None and strategy is not None:
        raise wrong_field(field, weights, f"none next to the strategy {strategy}: leave one out")
    if weights is not None:
        rows = [weights.values()] if isinstance(weights, dict) else weights
        _check_range(field, weights, itertools.chain.from_iterable(rows))
    elif strategy is not None and strategy.startswith("manual:"):
        by_name = parse_strategy(strategy, adapters).argument
        _check_range("fusion.strategy", strategy, by_name.values())
    return Weighing(
        by=strategy if weights is None else weights,
        adapters=fusion.adapters,
        prefill=fusion.prefill,
        relays=fusion.relay is not False,
        drafts=fusion.draft,
    )


def _check_range(field: str, value: Any, weights: Iterable[Any]) -> None:
    for weight in weights:
        if type(weight) not in (int, float) or abs(weight) > MAX_WEIGHT:
            raise wrong_field(field, value, f"weights {RANGE}")
