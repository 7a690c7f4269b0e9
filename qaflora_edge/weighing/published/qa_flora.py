"""The strategy `qa-flora`: the published method, with nothing measured beforehand."""

from qaflora_edge.config import PROBING, SHAPING, Option
from qaflora_edge.weighing.plan import Plan
from qaflora_edge.weighing.strategy import Measure, Measured, Reading, Strategy

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


STRATEGIES = (QaFlora(),)
