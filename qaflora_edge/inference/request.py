"""A request: what one answer is made from, how its tokens are chosen, and what ends it early.

It knows nothing of contexts.
"""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qaflora_edge.arrays import F32
from qaflora_edge.config import MAX_SEED as MAX_SEED
from qaflora_edge.config import check, default
from qaflora_edge.errors import OptionError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen and when to stop: the options of `config` in the group sampling.

    max_tokens   None: until the context is full
    temperature  0, or below 1e-6: greedy
    seed         None: a new one each time
    stop         texts that end the answer; they are not part of it
    grammar      what the answer follows: GBNF text, or a constraint.Grammar
    logit_bias   token id, as a number or in digits -> what is added to its logit
    logprobs     None, or how many of the likeliest tokens are kept beside each one that is chosen
    """

    max_tokens: int | None = default("max_tokens")
    temperature: float = default("temperature")
    top_p: float = default("top_p")
    seed: int | None = default("seed")
    stop: tuple[str, ...] = default("stop")
    grammar: str | None = default("grammar")
    top_k: int = default("top_k")
    min_p: float = default("min_p")
    repeat_penalty: float = default("repeat_penalty")
    frequency_penalty: float = default("frequency_penalty")
    presence_penalty: float = default("presence_penalty")
    logit_bias: Mapping[int | str, float] | None = default("logit_bias")
    logprobs: int | None = default("logprobs")

    def __post_init__(self) -> None:
        check("sampling", vars(self))


def make_sampling(stop: Any, **options: Any) -> Sampling:
    """Sampling of options as a caller gave them: stop as one text, several or None.

    Raises OptionError for one that does not exist, or has a wrong value.
    """
    if "strategy" in options:
        raise OptionError(
            f"Option strategy is {options['strategy']!r}, expected no such option here: an answer "
            f"takes its strategy as weights={options['strategy']!r}."
        )
    stops = () if stop is None else (stop,) if isinstance(stop, str) else stop
    check("sampling", {**options, "stop": stops})
    return Sampling(stop=tuple(stops), **options)


class Cancellation:
    """Whether a call was told to end, by cancel() or by an event that the caller gave."""

    def __init__(self, event: threading.Event | None = None) -> None:
        self._is_set, self._event = False, event

    @property
    def is_set(self) -> bool:
        return self._is_set or (self._event is not None and self._event.is_set())

    def set(self) -> None:
        self._is_set = True


@dataclass(frozen=True, eq=False)
class Request:
    """A prompt, the weights that it is read and answered under, and how tokens are chosen.

    tokens        ids of the prompt
    weights       float32 [n_adapter, n_layer], of all loaded adapters
    adapters      names of those in use, for messages
    goes_on_from  number of the Sequence whose KV state stays as it was read, whatever its weights
                  were, as far as the prompt begins like what that one held; None: no other's
    keeps_logits  keep those after the prompt, and choose no token
    """

    tokens: tuple[int, ...]
    weights: F32
    sampling: Sampling = field(default_factory=Sampling)
    adapters: tuple[str, ...] = ()
    goes_on_from: int | None = None
    keeps_logits: bool = False
    cancellation: Cancellation = field(default_factory=Cancellation)

    @property
    def weights_key(self) -> bytes:
        """Equal where the weights are."""
        return self.weights.tobytes()
