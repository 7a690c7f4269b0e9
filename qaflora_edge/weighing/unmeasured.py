"""Strategies that need nothing measured: `qa-flora`, the published method, and `spectr`.

And those that do not look at the query: `static`, `single`, `manual` and `base`.
"""

from collections.abc import Mapping, Sequence

from qaflora_edge.arrays import F32
from qaflora_edge.config import PROBING, SHAPING, Option
from qaflora_edge.errors import StrategyError, WeightsError
from qaflora_edge.weighing.plan import Plan
from qaflora_edge.weighing.strategy import (
    ADDED,
    KINDS,
    Measure,
    Measured,
    Reading,
    Routing,
    Strategy,
)

_LARGEST = 3.4028234663852886e38  # of float32
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

    It is KL(base || adapter) of next tokens; the paper's ablations are distances of hidden states.
    """

    name = "qa-flora"
    help = "by the KL of the base's next-token distribution to the adapter's (the published method)"
    measured = DISTANCES["kl"]
    options = (*SHAPING, *PROBING, DISTANCE)

    def plan(self, reading: Reading) -> Plan:
        from qaflora_edge.weighing.numbers import normalise

        distance: Measure = reading.query.options.get("distance", "kl")
        divergence = reading.divergence(distance)
        return Plan.mix(normalise(divergence), divergence)

    def measured_under(self, options: str) -> Measured:
        for distance, measured in DISTANCES.items():
            if f"distance={distance}" in options.split(","):
                return measured
        return self.measured


class Spectral(Strategy):
    """Weigh by the mean over tokens and modules of softmax over the adapters of a size.

    x is the base's input of q, k and v. The published methods mix at each token, we once an answer.
    """

    routing: Routing
    compares = KINDS

    def plan(self, reading: Reading) -> Plan:
        weights, sizes = reading.routing(self.routing)
        return Plan.mix(weights, sizes)


class SpectR(Spectral):
    """Weigh by |scale B A x| (SpectR, arXiv 2504.03454)."""

    name = "spectr"
    help = "by the size of what each adapter adds to the attention's projections"
    routing = "spectr"
    measured = ADDED


class _Fixed(Strategy):
    """Weigh by adapter -> weight, which parse() gives, whatever the query is; others weigh 0."""

    is_probed = False

    def parse(self, argument: str, adapters: Sequence[str], text: str) -> dict[str, float]:
        return {}

    def plan(self, reading: Reading) -> F32:
        import numpy as np

        query = reading.query
        by_name: Mapping[str, float] = query.argument
        weights = [by_name.get(name, 0.0) for name in query.adapters]
        column = np.array(weights, np.float32)[:, None]
        return np.repeat(column, query.n_layer, axis=1)


class Static(_Fixed):
    """Weigh every adapter 1 / n_adapter: the paper's uniform mix."""

    name = "static"
    is_baseline = True
    help = "all alike"

    def parse(self, argument: str, adapters: Sequence[str], text: str) -> dict[str, float]:
        return {name: 1.0 / len(adapters) for name in adapters}


class Single(_Fixed):
    """Weigh one adapter 1."""

    name = "single"
    help = "one adapter alone"
    argument = "NAME"
    needs_argument = True
    is_base_prefilled = True

    def parse(self, argument: str, adapters: Sequence[str], text: str) -> dict[str, float]:
        return {_checked(argument, adapters, text): 1.0}


class Manual(_Fixed):
    """Weigh by numbers after the colon, applied as they are."""

    name = "manual"
    help = "by given weights, the same at every layer"
    argument = "NAME=W,NAME=W"
    needs_argument = True

    def parse(self, argument: str, adapters: Sequence[str], text: str) -> dict[str, float]:
        weights = {}
        for item in argument.split(","):
            name, _, number = item.partition("=")
            _checked(name, adapters, text)
            if name in weights:
                raise StrategyError(f"Strategy {text!r} names the adapter {name!r} twice.")
            try:
                weight = float(number)
            except ValueError:
                weight = float("nan")
            if not abs(weight) <= _LARGEST:
                raise WeightsError(
                    f"Strategy {text!r}: the weight of {name!r} is {number!r}, expected a finite "
                    "number as in manual:math=0.7,es=0.3."
                )
            weights[name] = weight
        return weights


class Base(_Fixed):
    """Weigh every adapter 0."""

    name = "base"
    help = "the base without any adapter"
    is_base_prefilled = True


STRATEGIES = (QaFlora(), SpectR(), Static(), Single(), Manual(), Base())


def _checked(name: str, adapters: Sequence[str], where: str) -> str:
    if name not in adapters:
        raise StrategyError(
            f"Strategy {where!r} names the adapter {name!r}, which is not loaded; "
            f"expected one of: {', '.join(adapters) or 'none is loaded'}."
        )
    return name
