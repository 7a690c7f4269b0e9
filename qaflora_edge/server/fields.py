"""Fields of requests: what is followed, with its limits; what is wrong is refused by its name."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qaflora_edge.config import in_group
from qaflora_edge.openai.call_options import FIXED, openai_options
from qaflora_edge.server.options import (
    MAX_CHOICES,
    MAX_FORM_BYTES,
    MAX_MESSAGES,
    MAX_STOPS,
    MAX_TOOLS,
    MAX_WEIGHT,
)
from qaflora_edge.server.refusals import Refusal, wrong_field
from qaflora_edge.weighing.numbers import FusionWeights
from qaflora_edge.weighing.strategy import parse_strategy
from qaflora_edge.weighing.weigher import Weights

RETURNS = ("summary", "layers", "none")
_FUSION = ("strategy", "adapters", "weights", "return")
_SAMPLING = in_group("sampling")
OF_SAMPLING = {name for option in _SAMPLING.values() for name in (option.name, *option.aliases)}
_PROSE = {"type": "text"}  # a response_format that asks for nothing
_OF_CHAT = frozenset(
    {*OF_SAMPLING, *FIXED, "n", "top_logprobs", "tools", "tool_choice", "parallel_tool_calls"}
    | {"response_format", "json_schema"}
)


@dataclass(frozen=True)
class Fusion:
    """How a request wants to be weighed, and what of it the answer tells.

    weights   a strategy, or weights as Engine.generate takes them; None: the default
    adapters  those in use, None: all
    returned  "summary", "layers" or "none"
    """

    weights: Weights = None
    adapters: list[str] | None = None
    returned: str = "summary"

    @property
    def options(self) -> dict[str, Any]:
        """Keywords of Engine.generate."""
        return {"weights": self.weights, "adapters": self.adapters}

    def answer_fields(self, fusion: FusionWeights) -> dict[str, Any]:
        """The field `fusion` of an answer, or nothing."""
        if self.returned == "none":
            return {}
        named = list(zip(fusion.adapters, fusion.weights, strict=True))
        told: dict[str, Any] = {
            "strategy": fusion.strategy,
            "probe_ms": round(fusion.probe_ms, 3),
            "weights": {name: round(float(row.mean()), 6) for name, row in named},
        }
        if self.returned == "layers":
            told["layers"] = {name: [float(weight) for weight in row] for name, row in named}
        return {"fusion": told}

    def headers(self, fusion: FusionWeights) -> dict[str, str]:
        """The mix as a header, such as math=0.61,es=0.39."""
        if self.returned == "none" or not fusion.adapters:
            return {}
        named = zip(fusion.adapters, fusion.weights, strict=True)
        return {"X-Fusion": ",".join(f"{name}={float(row.mean()):.2f}" for name, row in named)}


def read_fusion(body: Mapping[str, Any], strategy: str | None, adapters: Sequence[str]) -> Fusion:
    """The field `fusion`, or llama-server's `lora`.

    strategy  that the model id names
    adapters  of the bundle, in order

    Raises Refusal for what is no field of it, or has a wrong value.
    """
    given = body.get("fusion")
    given = {} if given is None else given
    if not isinstance(given, Mapping):
        raise wrong_field("fusion", given, 'an object, as in {"strategy": "calibrated"}')
    for key in given:
        if key not in _FUSION:
            raise Refusal(
                400,
                f"The field fusion.{key:.80} does not exist, expected one of {', '.join(_FUSION)}.",
                param=f"fusion.{key:.80}",
                code="unknown_field",
            )
    returned = given.get("return") or "summary"
    if returned not in RETURNS:
        raise wrong_field("fusion.return", returned, f"one of {', '.join(RETURNS)}")
    weights, by = _weights(given.get("weights")), "fusion.weights"
    if body.get("lora") is not None:
        if weights is not None:
            raise wrong_field("lora", body["lora"], "no such field beside fusion.weights")
        weights, by = _of_lora(body["lora"], adapters), "lora"
    named = _strategy(given.get("strategy"), strategy, adapters)
    if weights is not None and named is not None:
        found = weights if by == "fusion.weights" else body[by]
        raise wrong_field(by, found, f"none beside the strategy {named}: leave one of them out")
    return Fusion(named if weights is None else weights, _adapters(given, adapters), returned)


def _strategy(given: Any, of_model: str | None, adapters: Sequence[str]) -> str | None:
    if given is None:
        return of_model
    if not isinstance(given, str) or not given:
        raise wrong_field("fusion.strategy", given, "the name of a strategy")
    if given.startswith("manual:"):
        weights = parse_strategy(given, adapters).argument
        if not all(map(_is_weight, weights.values())):
            expected = f"weights from {-MAX_WEIGHT:g} to {MAX_WEIGHT:g}"
            raise wrong_field("fusion.strategy", given, expected)
    if of_model not in (None, given):
        raise wrong_field("fusion.strategy", given, f"{of_model}, as the model says, or nothing")
    return given


def _adapters(given: Mapping[str, Any], known: Sequence[str]) -> list[str] | None:
    names = given.get("adapters")
    if names is None:
        return None
    if not isinstance(names, list) or any(name not in known for name in names):
        raise wrong_field("fusion.adapters", names, f"a list out of {', '.join(known) or 'none'}")
    return names


def _weights(weights: Any) -> Any:
    if weights is None:
        return None
    expected = (
        'weights by name, as in {"math": 0.7}, or [n_adapter][n_layer] numbers, from '
        f"{-MAX_WEIGHT:g} to {MAX_WEIGHT:g}"
    )
    if isinstance(weights, Mapping):
        if not all(_is_weight(weight) for weight in weights.values()):
            raise wrong_field("fusion.weights", weights, expected)
        return weights
    rows = weights if isinstance(weights, list) else [None]
    if not all(isinstance(row, list) and all(map(_is_weight, row)) for row in rows):
        raise wrong_field("fusion.weights", weights, expected)
    return weights


def _of_lora(lora: Any, adapters: Sequence[str]) -> dict[str, float]:
    """llama-server's list of scales: adapters that it does not name weigh 0."""
    expected = (
        f'a list such as [{{"id": 0, "scale": 0.5}}] with ids below {len(adapters)} and scales '
        f"from {-MAX_WEIGHT:g} to {MAX_WEIGHT:g}"
    )
    weights: dict[str, float] = {}
    for each in lora if isinstance(lora, list) else [None]:
        entry = each if isinstance(each, Mapping) else {}
        number: Any = entry.get("id")
        scale: Any = entry.get("scale")
        if type(number) is not int or not 0 <= number < len(adapters) or not _is_weight(scale):
            raise wrong_field("lora", lora, expected)
        weights[adapters[number]] = scale
    return weights


def _is_weight(value: object) -> bool:
    is_real = isinstance(value, int | float) and not isinstance(value, bool)
    return is_real and abs(value) <= MAX_WEIGHT  # type: ignore[arg-type]


def flag(body: Mapping[str, Any], name: str, *, of: str = "") -> bool:
    """A field that is true or false; null and nothing are false.

    of  the name of the field that it is in
    """
    value = body.get(name)
    if not isinstance(value, bool | None):
        raise wrong_field(f"{of}.{name}" if of else name, value, "true or false")
    return bool(value)


def includes_usage(body: Mapping[str, Any]) -> bool:
    """stream_options.include_usage."""
    options = body.get("stream_options")
    if options is None:
        return False
    if not isinstance(options, Mapping):
        raise wrong_field("stream_options", options, 'an object, as in {"include_usage": true}')
    return flag(options, "include_usage", of="stream_options")


def messages(body: Mapping[str, Any]) -> list[Any]:
    """The conversation; each message is checked where it is read."""
    found = body.get("messages")
    if not isinstance(found, list) or not found:
        raise wrong_field("messages", found, "a list of messages")
    if len(found) > MAX_MESSAGES:
        raise Refusal(
            400,
            f"The field messages has {len(found)} messages, expected {MAX_MESSAGES} at most.",
            param="messages",
        )
    return found


def chat_options(body: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a chat as openai.chat.begin_chat takes them.

    defaults  of the sampling options that a request does not give

    Raises Refusal or OptionError for one that cannot be followed.
    """
    given = {name: value for name, value in body.items() if name in _OF_CHAT}
    given = {name: value for name, value in given.items() if value is not None}
    schema = given.pop("json_schema", None)  # llama-server's own
    if schema is not None:
        if given.get("response_format", _PROSE) != _PROSE:
            raise wrong_field("json_schema", schema, "nothing beside response_format")
        given["response_format"] = {"type": "json_object", "schema": schema}
    options = openai_options(given)
    _check_limits(options)
    return with_defaults(options, defaults, ("grammar", "response_format", "tools"))


def text_options(body: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a completion of text as Engine.answers takes them, `n` among them."""
    fixed = {name: body[name] for name in ("suffix", "best_of") if body.get(name) is not None}
    n = 1 if body.get("n") is None else body["n"]
    for name, harmless in (("suffix", ""), ("best_of", n)):
        if fixed.get(name, harmless) != harmless:
            raise wrong_field(name, fixed[name], "nothing: it cannot be followed here")
    given = {name: value for name, value in body.items() if name in OF_SAMPLING}
    given = {name: value for name, value in given.items() if value is not None}
    n_top = given.pop("logprobs", None)  # here a number
    given = openai_options(given)
    if n_top is not None and n_top is not False:
        given["logprobs"] = n_top
    options = {**given, "n": n, "json_schema": body.get("json_schema")}
    _check_limits(options)
    given = {name: value for name, value in defaults.items() if value is not None}
    return with_defaults(options, {"max_tokens": 16, **given}, ("grammar", "json_schema"))


def with_defaults(
    options: dict[str, Any], defaults: Mapping[str, Any], forms: Sequence[str]
) -> dict[str, Any]:
    """Options, and the defaults of others. A stop text among these is meant for prose."""
    asked = {form: options.get(form) for form in forms}
    if options.get("tool_choice") == "none":
        asked.pop("tools", None)
    has_form = any(form and form != _PROSE for form in asked.values())
    own = {name: value for name, value in defaults.items() if name != "stop" or not has_form}
    return {**own, **options}


def _check_limits(options: Mapping[str, Any]) -> None:
    n = options.get("n", 1)
    if type(n) is not int or not 1 <= n <= MAX_CHOICES:
        raise wrong_field("n", n, f"a number of answers from 1 to {MAX_CHOICES}")
    stop = options.get("stop")
    if isinstance(stop, list) and len(stop) > MAX_STOPS:
        raise wrong_field("stop", stop, f"{MAX_STOPS} texts at most")
    tools = options.get("tools")
    if tools is not None and (not isinstance(tools, list) or len(tools) > MAX_TOOLS):
        raise wrong_field("tools", tools, f"a list of {MAX_TOOLS} tools at most")
    if not isinstance(options.get("parallel_tool_calls"), bool | None):
        raise wrong_field("parallel_tool_calls", options["parallel_tool_calls"], "true or false")
    for name in ("grammar", "response_format", "json_schema", "tools"):
        form = options.get(name)
        if form and len(json.dumps(form)) > MAX_FORM_BYTES:
            raise wrong_field(name, form, f"no more than {MAX_FORM_BYTES} bytes")
