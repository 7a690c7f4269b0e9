"""Options of other programs' calls: renamed, taken without effect, or refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qaflora_edge.config import in_group
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


def openai_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of OpenAI's chat completions as `Engine.generate` takes them; others stay.

    Raises OptionError for one that cannot be followed.
    """
    known = {**options}
    check_fixed("chat", {name: known.pop(name) for name in _FIXED if name in known}, _FIXED)
    for name in _UNUSED & known.keys():
        del known[name]
    sampling = in_group("sampling")
    for name, option in sampling.items():
        for alias in option.aliases:
            value = known.pop(alias, None)
            if value is not None and known.setdefault(name, value) != value:
                raise OptionError(
                    f"Options {name} and {alias} are {known[name]!r} and {value!r}, expected one "
                    "of them; leave the other out."
                )
    # Where null says "the default".
    return {
        name: value for name, value in known.items() if name not in sampling or value is not None
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
