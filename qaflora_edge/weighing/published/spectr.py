"""The strategy `spectr`, and what it has in common with `arrow`."""

from qaflora_edge.weighing.plan import Plan
from qaflora_edge.weighing.strategy import ADDED, KINDS, Reading, Routing, Strategy


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


STRATEGIES = (SpectR(),)
