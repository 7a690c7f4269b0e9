"""Options of requests: renamed, taken without effect, or refused by name; tools and weighing."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qaflora_edge.ask import Sampling, Tools, Weighing
from qaflora_edge.config import in_group
from qaflora_edge.errors import OptionError, wrong_field, wrong_option
from qaflora_edge.formats.inputs import Json, Object
from qaflora_edge.weighing.strategy import parse_strategy

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
MAX_WEIGHT = 100.0  # of a request, up or down: states overflow at some number beyond
RANGE = f"from {-MAX_WEIGHT:g} to {MAX_WEIGHT:g}"
_NO_THOUGHT = ("none", "minimal")


def sampling_of(body: Object, defaults: Sampling, method: str = "chat") -> Sampling:
    """Read how tokens are chosen; the defaults hold where a body says nothing, or null.

    Of two names of one option OpenAI's newer one counts.

    method  whose body it is, for messages
    """
    check_off(method, body, FIXED)
    options = {}
    for name, option in SAMPLING.items():
        if body.get(name) is not None:
            options[option] = body[name]
    n_top = _n_logprob(body.get("logprobs"), body.get("top_logprobs"))
    if n_top is not None:
        options["logprobs"] = n_top
    return defaults.updated(options)


def _n_logprob(is_wanted: Any, n_top: Any) -> int | None:
    """Return OpenAI's `logprobs` and `top_logprobs` as one option; the second implies the first."""
    if not isinstance(is_wanted, bool | None):
        raise wrong_option("logprobs", is_wanted, "true or false")
    option = in_group("sampling")["logprobs"]
    if n_top is not None and not option.fits(n_top):
        raise wrong_option("top_logprobs", n_top, option.expected)
    if not is_wanted and not n_top:
        return None
    return n_top or 0


def check_off(method: str, body: Object, fixed: Mapping[str, tuple[Any, ...]]) -> None:
    """Raise OptionError for an option of `fixed` that asks for something which cannot be done.

    An option is off when it is None, False, 0, -1 or empty, or has a value of `fixed`.
    """
    for name, harmless in fixed.items():
        value = body.get(name)
        if value and value not in (-1, *harmless):
            raise OptionError(
                f"Option {name} of {method} is {value!r:.200}, expected nothing: it cannot be "
                "followed here. Leave it out.",
                name,
            )


def wants_thoughts(effort: str | bool | None) -> bool:
    """Tell whether an effort, as thinking() takes it, asks for thoughts; None does not."""
    return effort not in (*_NO_THOUGHT, False, None)


def thinking(effort: str | bool) -> Json:
    """Return an effort as variables of chat templates; bases that do not think read none.

    effort  OpenAI's `reasoning_effort` or Ollama's `think`: "none", "minimal" and False ask for no
            thought, all else for one
    """
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


def weighing_of(body: Object, of_model: str | None, adapters: Sequence[str]) -> Weighing:
    """Combine the fields `fusion` and `lora` with the strategy that the model id names."""
    fusion = body.get("fusion") or {}
    weights = fusion.get("weights")
    field = "fusion.weights"
    lora = body.get("lora")
    if lora is not None:
        if weights is not None or any(scale["id"] >= len(adapters) for scale in lora):
            expected = f"ids below {len(adapters)}, and no fusion.weights"
            raise wrong_field("lora", lora, expected)
        weights = {adapters[scale["id"]]: scale["scale"] for scale in lora}
        field = "lora"
    strategy = fusion.get("strategy") or of_model
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
        adapters=fusion.get("adapters"),
        prefill=fusion.get("prefill"),
        drafts=fusion.get("relay") is not False,
    )


def _check_range(field: str, value: Any, weights: Iterable[Any]) -> None:
    for weight in weights:
        if type(weight) not in (int, float) or abs(weight) > MAX_WEIGHT:
            raise wrong_field(field, value, f"weights {RANGE}")
