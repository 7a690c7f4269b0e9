"""Strategies that need nothing measured: `qa-flora`, the published method, and `spectr`."""

from collections.abc import Sequence
from typing import Any

from qaflora_edge.config import PROBING, SHAPING, Option
from qaflora_edge.errors import StrategyError
from qaflora_edge.weighing.strategy import (
    ADDED,
    KINDS,
    Measure,
    Measured,
    Mix,
    Probe,
    Query,
    Reading,
    Strategy,
)

DISTANCE = Option(
    "distance",
    str,
    "kl",
    choices=("kl", "cosine", "euclidean"),
    help="how far an adapter moves the base: KL of next tokens, or a distance of hidden states",
)
DISTANCES = {
    "kl": Measured("divergence", " nats", ("lens", "pool")),
    "cosine": Measured("cosine distance", reads=("pool",)),
    "euclidean": Measured("distance", reads=("pool",)),
}


class QaFlora(Strategy):
    """Weigh each adapter by its share of a layer's divergence (qa-FLoRA, arXiv 2512.11366).

    It is KL(base || adapter) of next-token distributions; the paper's ablations are distances of
    hidden states.
    """

    name = "qa-flora"
    help = "by the KL of the base's next-token distribution to the adapter's (the published method)"
    measured = DISTANCES["kl"]
    options = (*SHAPING, *PROBING, DISTANCE)

    def weigh(self, query: Query, probe: Probe, argument: Any) -> Mix:
        from qaflora_edge.weighing.numbers import normalise

        distance: Measure = query.options.get("distance", "kl")
        divergence = probe.divergence(distance)
        return Mix(normalise(divergence), divergence)

    def measured_under(self, options: str) -> Measured:
        for distance, measured in DISTANCES.items():
            if f"distance={distance}" in options.split(","):
                return measured
        return self.measured


class Spectral(Strategy):
    """Weigh by the mean over tokens and modules of softmax over the adapters of a size.

    x is the input of q, k and v in the base alone. The published methods mix at each token; here
    one mix holds for the whole answer.
    """

    reading: Reading
    compares = KINDS

    def weigh(self, query: Query, probe: Probe, argument: Any) -> Mix:
        return Mix(*probe.routing(self.reading))


class SpectR(Spectral):
    """Weigh by |scale B A x| (SpectR, arXiv 2504.03454)."""

    name = "spectr"
    help = "by the size of what each adapter adds to the attention's projections"
    reading = "spectr"
    measured = ADDED


STRATEGIES = (QaFlora(), SpectR())


def check_typical(strategy: str, query: Query, keys: Sequence[str], how: str) -> None:
    """Raise StrategyError where an adapter lacks one of some keys of `typical`."""
    missing = []
    for name in query.adapters:
        typical = query.typical.get(name, {})
        if not all(key in typical for key in keys):
            missing.append(name)
    if missing:
        raise StrategyError(
            f"Strategy {strategy} needs typical divergences, missing for {', '.join(missing)} "
            f"{how}; measure them with `qaflora bundle calibrate DIR`."
        )
