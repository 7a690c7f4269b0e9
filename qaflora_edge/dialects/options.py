"""OpenAI's options: renamed, taken without effect, or refused by name; and tools, checked."""

from collections.abc import Mapping, Sequence
from typing import Any

from qaflora_edge.ask import Sampling, Tools
from qaflora_edge.config import in_group
from qaflora_edge.errors import OptionError, wrong_option

# Of OpenAI's chat completions: the answer is right without.
UNUSED = frozenset(
    {"model", "user", "store", "metadata", "service_tier", "safety_identifier"}
    | {"prompt_cache_key", "prompt_cache_retention", "prediction"}
    | {"verbosity", "web_search_options", "best_of", "function_call"}
)
# The answer would be wrong without: each has to be off, or at one of these values.
FIXED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("functions", "audio"), ()),
    **dict.fromkeys(("suffix", "echo"), ()),  # of texts
    "modalities": (["text"],),
    "reasoning_format": ("auto", "deepseek"),  # llama-server's: thoughts are kept apart
}
ALIASES = {
    alias: option.name for option in in_group("sampling").values() for alias in option.aliases
}
# Field -> option; `logprobs` is another one here.
SAMPLING = {name: name for name in in_group("sampling") if name != "logprobs"} | ALIASES
_NO_THOUGHT = ("none", "minimal")


def sampling_of(body: Mapping[str, Any], defaults: Sampling) -> Sampling:
    """Read how tokens are chosen; the defaults hold where a body says nothing, or null.

    Of two names of one option OpenAI's newer one counts.

    Raises OptionError for an option that cannot be followed.
    """
    check_off("chat", {name: body[name] for name in FIXED if name in body}, FIXED)
    asked = {}
    for name, option in SAMPLING.items():
        if body.get(name) is not None:
            asked[option] = body[name]
    n_top = _n_logprob(body.get("logprobs"), body.get("top_logprobs"))
    if n_top is not None:
        asked["logprobs"] = n_top
    return defaults.updated(asked)


def wants_thoughts(effort: str | bool | None) -> bool:
    """Tell whether an effort, as thinking() takes it, asks for thoughts; None does not."""
    return effort not in (*_NO_THOUGHT, False, None)


def thinking(effort: str | bool) -> dict[str, Any]:
    """Return an effort as variables of chat templates; bases that do not think read none.

    effort  OpenAI's `reasoning_effort` or Ollama's `think`: "none", "minimal" and False ask for no
            thought, all else for one

    Raises OptionError for what is neither.
    """
    if not isinstance(effort, str | bool):
        raise wrong_option("reasoning_effort", effort, "a text such as none, low or high")
    is_wanted = wants_thoughts(effort)
    variables: dict[str, Any] = {"enable_thinking": is_wanted, "thinking": is_wanted}
    if is_wanted and isinstance(effort, str):
        variables["reasoning_effort"] = effort  # gpt-oss reads it
    return variables


def _n_logprob(is_asked: Any, n_top: Any) -> int | None:
    """Return OpenAI's `logprobs` and `top_logprobs` as one option; the second implies the first."""
    if not isinstance(is_asked, bool | None):
        raise wrong_option("logprobs", is_asked, "true or false")
    option = in_group("sampling")["logprobs"]
    if n_top is not None and not option.fits(n_top):
        raise wrong_option("top_logprobs", n_top, option.expected)
    return (n_top or 0) if is_asked or n_top else None


def check_off(
    method: str, options: Mapping[str, Any], harmless: Mapping[str, tuple[Any, ...]]
) -> None:
    """Raise OptionError for an option that asks for something which cannot be done.

    An option is off when it is None, False, 0, -1 or empty, or has a value of `harmless`.
    """
    for name, value in options.items():
        if value and value not in (-1, *harmless.get(name, ())):
            raise OptionError(
                f"Option {name} of {method} is {value!r:.200}, expected nothing: it cannot be "
                "followed here. Leave it out.",
                name,
            )


def chosen_tools(tools: Any, tool_choice: Any, is_parallel: bool | None = None) -> Tools | None:
    """Check the tools that the base is told of; find those of which it has to call one.

    tool_choice  None, "auto", "none", "required", or {"type": "function", "function": {"name": N}}
    is_parallel  False: only the first call of an answer counts

    Raises OptionError for what is no tool, or a choice that is not among them.
    """
    checked = [_checked(tool) for tool in tools or ()]
    required: list[dict[str, Any]] = []
    if tool_choice == "none":
        checked = []
    elif tool_choice == "required" and checked:
        required = checked
    elif tool_choice not in (None, "auto"):
        required = [_named(checked, tool_choice)]
    return Tools(checked, required, is_parallel is False) if checked else None


def _named(tools: Sequence[dict[str, Any]], tool_choice: Any) -> dict[str, Any]:
    """Find the tool that a choice names."""
    function = _function(tool_choice)
    name = function.get("name") if isinstance(function, Mapping) else None
    for tool in tools:
        if tool["function"]["name"] == name:
            return tool
    names = ", ".join(tool["function"]["name"] for tool in tools) or "none is given"
    form = "{'type': 'function', 'function': {'name': ...}}"
    expected = f"auto, none, required, or {form} with a name out of: {names}"
    raise wrong_option("tool_choice", tool_choice, expected)


def _checked(tool: Any) -> dict[str, Any]:
    function = _function(tool)
    if isinstance(function, Mapping):
        function = {name: each for name, each in function.items() if each is not None}
    if (
        not isinstance(function, Mapping)
        or not isinstance(function.get("name"), str)
        or not isinstance(function.get("parameters", {}), Mapping)
    ):
        raise OptionError(
            f"Option tools has {tool!r:.200}, expected {{'type': 'function', 'function': "
            "{'name': ..., 'description': ..., 'parameters': a JSON schema}}.",
            "tools",
        )
    return {"type": "function", "function": function}


def _function(given: Any) -> Any:
    """Return the function of a tool or choice; those of responses have no inner object."""
    if not isinstance(given, Mapping) or given.get("type", "function") != "function":
        return None
    flat = {name: each for name, each in given.items() if name not in ("type", "strict")}
    return given.get("function", flat)
