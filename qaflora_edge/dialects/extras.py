"""What every answer of the server has besides its dialect's fields: the mix, and the times."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qaflora_edge.ask import Weighing
from qaflora_edge.errors import OptionError
from qaflora_edge.inference.generation import Generation
from qaflora_edge.weighing.numbers import FusionWeights
from qaflora_edge.weighing.strategy import parse_strategy

MAX_WEIGHT = 100.0  # of a request, up or down: states overflow at some number beyond
RANGE = f"from {-MAX_WEIGHT:g} to {MAX_WEIGHT:g}"


def wrong_field(param: str, found: object, expected: str) -> OptionError:
    """Make the error for a field of a body with a wrong value."""
    message = f"The field {param} is {found!r:.100}, expected {expected}."
    return OptionError(message, param)


def weighing_of(body: Mapping[str, Any], of_model: str | None, adapters: Sequence[str]) -> Weighing:
    """Combine the fields `fusion` and `lora` with the strategy that the model id names.

    Raises OptionError where they contradict each other, or a weight is too large.
    """
    fusion = body.get("fusion") or {}
    weights = fusion.get("weights")
    field = "fusion.weights"
    if (lora := body.get("lora")) is not None:
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
    if strategy is not None and strategy.startswith("manual:"):
        _check_range("fusion.strategy", strategy, parse_strategy(strategy, adapters).argument)
    elif weights is not None:
        _check_range(field, weights, weights)
    return Weighing(
        strategy if weights is None else weights,
        fusion.get("adapters"),
        fusion.get("prefill"),
        relays=fusion.get("relay") is not False,
    )


def _check_range(field: str, found: Any, weights: Any) -> None:
    """Refuse a field with weights, by name or by layer, that are too large or no numbers."""
    rows = [weights.values()] if isinstance(weights, dict) else weights
    for weight in itertools.chain.from_iterable(rows):
        if type(weight) not in (int, float) or abs(weight) > MAX_WEIGHT:
            raise wrong_field(field, found, f"weights {RANGE}")


@dataclass(frozen=True)
class Extras:
    """Say what answers tell besides.

    returned  how much of the mix: summary, why, layers or none
    spell     writes tokens for `__verbose`; None: nobody asked
    drafts_are_thoughts  a relay's draft is told as a thought; else in the field `fusion`
    """

    returned: str = "summary"
    spell: Callable[[Sequence[int]], str] | None = None
    drafts_are_thoughts: bool = False

    def draft(self, piece: str) -> dict[str, Any]:
        """Return the field `fusion` of a chunk with a piece of a relay's draft."""
        return {} if self.returned == "none" else {"fusion": {"draft": piece}}

    def mix(self, fusion: FusionWeights) -> dict[str, Any]:
        """Return the field `fusion` of an answer."""
        if self.returned == "none":
            return {}
        found: dict[str, Any] = {
            "strategy": fusion.strategy,
            "probe_ms": round(fusion.probe_ms, 3),
            "weights": {name: round(mean, 6) for name, mean in fusion.means.items()},
            **fusion.relay_dict(),
        }
        if self.returned in ("why", "layers"):
            found |= fusion.why_dict()
        if self.returned == "layers":
            found["layers"] = dict(zip(fusion.adapters, fusion.weights.tolist(), strict=True))
        return {"fusion": found}

    def end(self, first: Generation) -> dict[str, Any]:
        """Return what is told at the end of answers, by the first of them."""
        end = {**self.mix(first.fusion), "timings": timings(first)}
        if self.spell is not None:
            end["__verbose"] = {"prompt": self.spell(first.prompt)}
        return end

    def reworded(self, choice: dict[str, Any]) -> dict[str, Any]:
        """Say in OpenAI's words that the time limit has cut an answer: by length."""
        is_cut = choice["finish_reason"] == "cancelled"
        return {**choice, "finish_reason": "length"} if is_cut else choice


class _Nothing(Extras):
    """Add nothing, for callers in Python."""

    def draft(self, piece: str) -> dict[str, Any]:
        return {}

    def mix(self, fusion: FusionWeights) -> dict[str, Any]:
        return {}

    def end(self, first: Generation) -> dict[str, Any]:
        return {}

    def reworded(self, choice: dict[str, Any]) -> dict[str, Any]:
        return choice


NOTHING = _Nothing()


def timings(answer: Generation) -> dict[str, float]:
    """Return the times of an answer in our names and in those of llama-server."""
    ours = answer.timings.to_dict()
    n_read = answer.n_prompt - answer.n_cached
    prompt_ms = ours["prefill_ms"]
    return {
        **ours,
        "cache_n": answer.n_cached,
        "prompt_n": n_read,
        "prompt_ms": prompt_ms,
        "prompt_per_second": round(1e3 * n_read / prompt_ms, 3) if prompt_ms else 0.0,
        "predicted_n": answer.n_completion,
        "predicted_ms": ours["decode_ms"],
        "predicted_per_second": ours["tokens_per_second"],
    }
