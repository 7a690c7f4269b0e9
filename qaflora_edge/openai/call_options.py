"""Options of other programs' calls: renamed, taken without effect, or refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qaflora_edge.errors import OptionError

# Of OpenAI's chat completions: what changes no answer here.
_UNUSED = frozenset(
    {"model", "user", "store", "metadata", "service_tier", "safety_identifier"}
    | {"prompt_cache_key", "prompt_cache_retention"}
)
# What has to stay at one of these values; the first is the default.
_FIXED = {
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "logit_bias": (None, {}),
    "functions": (None,),
    "function_call": (None,),
    "parallel_tool_calls": (None, True),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "reasoning_effort": (None,),
    "verbosity": (None,),
    "web_search_options": (None,),
}
# Where null says "the default".
_NULLABLE = ("max_tokens", "temperature", "top_p", "stop", "frequency_penalty", "presence_penalty")


def openai_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of OpenAI's chat completions as `Engine.generate` takes them; others stay.

    Raises OptionError for one that cannot be followed.
    """
    known = {**options}
    check_fixed("chat", {name: known.pop(name) for name in _FIXED if name in known}, _FIXED)
    for name in _UNUSED & known.keys():
        del known[name]
    most = known.pop("max_completion_tokens", None)
    if most is not None and known.setdefault("max_tokens", most) != most:
        raise OptionError(
            f"Options max_tokens and max_completion_tokens are {known['max_tokens']!r} and "
            f"{most!r}, expected one of them; leave the other out."
        )
    return {
        name: value for name, value in known.items() if name not in _NULLABLE or value is not None
    }


def check_fixed(
    method: str,
    options: Mapping[str, Any],
    fixed: Mapping[str, tuple[Any, ...]],
    *,
    unused: frozenset[str] = frozenset(),
) -> None:
    """Raise OptionError for an option that is neither unused nor at a harmless value."""
    for name, value in options.items():
        if name in unused or (name in fixed and any(value == each for each in fixed[name])):
            continue
        expected = repr(fixed[name][0]) if name in fixed else "no such option"
        raise OptionError(
            f"Option {name} of {method} is {value!r}, expected {expected}: it cannot be followed "
            "here. Leave it out."
        )
