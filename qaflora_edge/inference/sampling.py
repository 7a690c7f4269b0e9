"""How a token is chosen: greedy or drawn, freely or under a grammar."""

from __future__ import annotations

from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

from qaflora_edge.errors import OptionError

MAX_SEED = 2**32 - 1  # llama.h LLAMA_DEFAULT_SEED: a new one each time


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen and when to stop.

    max_tokens   None: until the context is full
    temperature  0, or below 1e-6: greedy
    seed         None: a new one each time
    stop         texts that end the answer; they are not part of it
    grammar      a GBNF text that the answer follows, or None
    top_k        draw from so many likeliest tokens; 0: all
    min_p        draw from tokens at least so likely as this part of the likeliest
    repeat_penalty, frequency_penalty, presence_penalty  for tokens among the last 64 of the answer;
                 1, 0 and 0: none
    """

    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    grammar: str | None = None
    top_k: int = 0
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            expected, kind = _KINDS[field.name]
            value = getattr(self, field.name)
            if value is None and field.default is None:
                continue
            if isinstance(value, bool) or not isinstance(value, kind):
                raise OptionError(f"Option {field.name} is {value!r}, expected {expected}.")
        checks = (
            ("max_tokens", self.max_tokens is None or self.max_tokens >= 0, ">= 0"),
            ("temperature", 0.0 <= self.temperature < float("inf"), ">= 0"),
            ("top_p", 0.0 < self.top_p <= 1.0, "above 0 and at most 1"),
            ("seed", self.seed is None or 0 <= self.seed < MAX_SEED, "from 0 to 4294967294"),
            ("top_k", self.top_k >= 0, ">= 0"),
            ("min_p", 0.0 <= self.min_p <= 1.0, "from 0 to 1"),
            ("repeat_penalty", 0.0 < self.repeat_penalty < 100.0, "above 0 and below 100"),
            ("frequency_penalty", abs(self.frequency_penalty) < 100.0, "within ±100"),
            ("presence_penalty", abs(self.presence_penalty) < 100.0, "within ±100"),
            ("stop", all(self.stop), "texts that are not empty"),
        )
        for name, is_good, expected in checks:
            if not is_good:
                raise OptionError(f"Option {name} is {getattr(self, name)!r}, expected {expected}.")


_KINDS: dict[str, tuple[str, type]] = {
    "max_tokens": ("a whole number or None", Integral),
    "temperature": ("a number", Real),
    "top_p": ("a number", Real),
    "seed": ("a whole number or None", Integral),
    "stop": ("texts", tuple),
    "grammar": ("GBNF text or None", str),
    "top_k": ("a whole number", Integral),
    "min_p": ("a number", Real),
    "repeat_penalty": ("a number", Real),
    "frequency_penalty": ("a number", Real),
    "presence_penalty": ("a number", Real),
}


def make_sampling(stop: Any, **options: Any) -> Sampling:
    """Sampling of options as a caller gave them: stop as one text, several or None.

    Raises OptionError for one that does not exist, or has a wrong value.
    """
    for name, value in options.items():
        if name not in _KINDS:
            raise OptionError(
                f"Option {name} is {value!r}, expected no such option; those of sampling are "
                f"{', '.join(_KINDS)}."
            )
    stops = () if stop is None else (stop,) if isinstance(stop, str) else stop
    if not isinstance(stops, (list, tuple)) or not all(isinstance(text, str) for text in stops):
        raise OptionError(f"Option stop is {stop!r}, expected a text or a list of texts.")
    return Sampling(stop=tuple(stops), **options)
