"""Options of other programs' calls: renamed, taken without effect, or refused by name."""

from collections.abc import Mapping
from typing import Any

from qaflora_edge.config import in_group
from qaflora_edge.errors import OptionError, wrong_option

# Of OpenAI's chat completions: the answer is right without.
_UNUSED = frozenset(
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
_NO_THOUGHT = ("none", "minimal")


def openai_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options of OpenAI's as `Engine.generate` takes them; others stay, null is left out.

    Of two names of one option OpenAI's newer one counts.

    Raises OptionError for one that cannot be followed.
    """
    known = {**options}
    check_off("chat", {name: known.pop(name) for name in FIXED if name in known}, FIXED)
    for name in _UNUSED & known.keys():
        del known[name]
    if (effort := known.pop("reasoning_effort", None)) is not None:
        more = known.get("chat_template_kwargs")
        if isinstance(more, Mapping | None):
            known["chat_template_kwargs"] = {**thinking(effort), **(more or {})}
    known |= _logprobs(known.pop("logprobs", None), known.pop("top_logprobs", None))
    sampling = in_group("sampling")
    for name, option in sampling.items():
        for alias in option.aliases:
            if (value := known.pop(alias, None)) is not None:
                known[name] = value
    return {
        name: value for name, value in known.items() if name not in sampling or value is not None
    }


def thinking(effort: str | bool) -> dict[str, Any]:
    """Return an effort as variables of chat templates; bases that do not think read none.

    effort  OpenAI's `reasoning_effort` or Ollama's `think`: "none", "minimal" and False ask for no
            thought, all else for one

    Raises OptionError for what is neither.
    """
    if not isinstance(effort, str | bool):
        raise wrong_option("reasoning_effort", effort, "a text such as none, low or high")
    is_wanted = effort not in (*_NO_THOUGHT, False)
    variables: dict[str, Any] = {"enable_thinking": is_wanted, "thinking": is_wanted}
    if is_wanted and isinstance(effort, str):
        variables["reasoning_effort"] = effort  # gpt-oss reads it
    return variables


def _logprobs(is_asked: Any, n_top: Any) -> dict[str, Any]:
    """Return OpenAI's `logprobs` and `top_logprobs` as one option; the second implies the first."""
    if not isinstance(is_asked, bool | None):
        raise wrong_option("logprobs", is_asked, "true or false")
    option = in_group("sampling")["logprobs"]
    if n_top is not None and not option.fits(n_top):
        raise wrong_option("top_logprobs", n_top, option.expected)
    return {"logprobs": n_top or 0} if is_asked or n_top else {}


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
