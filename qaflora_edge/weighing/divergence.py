"""Strategies that weigh by how far each adapter moves the base: qa-FLoRA and its variants."""

from collections.abc import Sequence
from typing import Any

from qaflora_edge.config import PROBING, SHAPING
from qaflora_edge.errors import StrategyError
from qaflora_edge.weighing.strategy import Measure, Measured, Mix, Probe, Query, Strategy


class _Divergence(Strategy):
    """Weigh each adapter by its share of a layer's divergence."""

    measure: Measure = "kl"
    measured = Measured("divergence", " nats", ("lens", "pool"))
    options = (*SHAPING, *PROBING)

    def weigh(self, query: Query, probe: Probe, argument: Any) -> Mix:
        from qaflora_edge.weighing.numbers import normalise

        divergence = probe.divergence(self.measure)
        return Mix(normalise(divergence), divergence)


class QaFlora(_Divergence):
    """Weigh by KL(base || adapter) of next-token distributions (qa-FLoRA, arXiv 2512.11366)."""

    name = "qa-flora"
    help = "by the KL of the base's next-token distribution to the adapter's (the published method)"


class Cosine(_Divergence):
    """Weigh by 1 - cos of the base's and the adapter's state: the paper's ablation."""

    name = "cosine"
    help = "by the cosine distance of hidden states"
    measure = "cosine"
    measured = Measured("cosine distance", reads=("pool",))


class Euclidean(_Divergence):
    """Weigh by the Euclidean distance of the base's and the adapter's state."""

    name = "euclidean"
    help = "by the Euclidean distance of hidden states"
    measure = "euclidean"
    measured = Measured("distance", reads=("pool",))


class Calibrated(_Divergence):
    """Weigh by KL divided by the adapter's typical KL over neutral prompts, layer by layer.

    Our own: an adapter that moves every prompt far is not heavier for it.
    """

    name = "calibrated"
    help = "as qa-flora, relative to each adapter's typical divergence"
    needs_typical = ("norm", "raw", "question_norm", "question_raw")  # any lens, any pool

    def check(self, argument: Any, query: Query) -> None:
        place = "" if query.pool == "last" else f" at pool {query.pool}"
        check_typical(self.name, query, [_key(query)], f"with lens {query.lens}{place}")

    def weigh(self, query: Query, probe: Probe, argument: Any) -> Mix:
        from qaflora_edge.weighing import numbers

        divergence = probe.divergence()
        typical = [query.typical[name][_key(query)] for name in query.adapters]
        return Mix(numbers.normalise(numbers.calibrate(divergence, typical)), divergence)


STRATEGIES = (QaFlora(), Cosine(), Euclidean(), Calibrated())


def check_typical(strategy: str, query: Query, keys: Sequence[str], how: str) -> None:
    """Raise StrategyError where an adapter lacks one of some keys of `typical`."""
    missing = [
        name
        for name in query.adapters
        if not all(key in query.typical.get(name, {}) for key in keys)
    ]
    if missing:
        raise StrategyError(
            f"Strategy {strategy} needs typical divergences, missing for {', '.join(missing)} "
            f"{how}; measure them with `qaflora bundle calibrate DIR`."
        )


def _key(query: Query) -> str:
    return query.lens if query.pool == "last" else f"question_{query.lens}"
