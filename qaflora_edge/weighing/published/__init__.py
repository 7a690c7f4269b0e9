"""The strategies of papers, `qa-flora` and `spectr`, and `calibrated`: relative to the usual.

What they measure with is imported when they plan.
"""

from qaflora_edge.config import PROBING, SHAPING, Option
from qaflora_edge.weighing.plan import Plan
from qaflora_edge.weighing.strategy import (
    ADDED,
    KINDS,
    Measure,
    Measured,
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


class Calibrated(Strategy):
    """Weigh by KL divided by the adapter's typical KL over neutral prompts, layer by layer.

    Our own: an adapter that moves every prompt far is not heavier for it.
    """

    name = "calibrated"
    is_baseline = True
    help = "as qa-flora, relative to each adapter's typical divergence"
    measured = DISTANCES["kl"]
    options = (*SHAPING, *PROBING)
    needs_typical = ("norm", "raw", "question_norm", "question_raw")  # any lens, any pool

    def check(self, query: Query) -> None:
        from qaflora_edge.weighing.calibration import check_typical

        check_typical(self.name, query, [_key(query)])

    def plan(self, reading: Reading) -> Plan:
        from qaflora_edge.weighing import numbers

        query = reading.query
        divergence = reading.divergence()
        key = _key(query)
        typical = [query.typical[name][key] for name in query.adapters]
        relative = numbers.calibrate(divergence, typical)
        return Plan.mix(numbers.normalise(relative), divergence)


def _key(query: Query) -> str:
    """Name what is typical under the query's lens and pool, as in calibration.LAYERS."""
    if query.pool == "last":
        return query.lens
    return f"question_{query.lens}"


class SpectR(Strategy):
    """Weigh by the mean over tokens and modules of softmax over the adapters of |scale B A x|.

    x is the base's input of q, k and v. SpectR (arXiv 2504.03454) mixes at each token, we once an
    answer.
    """

    name = "spectr"
    help = "by the size of what each adapter adds to the attention's projections"
    measured = ADDED
    compares = KINDS

    def plan(self, reading: Reading) -> Plan:
        from qaflora_edge.weighing.published.projections import AttentionInputs

        weights, sizes = reading.listen(AttentionInputs)
        return Plan.mix(weights, sizes)


STRATEGIES = (QaFlora(), Calibrated(), SpectR())
