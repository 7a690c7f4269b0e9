"""The strategies `spectr`, `arrow` and `norm`: sizes at projections, in one pass of the base."""

from qaflora_edge.weighing.plan import Plan
from qaflora_edge.weighing.strategy import (
    ADDED,
    KINDS,
    QUERIES,
    Measured,
    Reading,
    Routing,
    Strategy,
)


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


class Arrow(Spectral):
    """Weigh by |v . x|, v the top right-singular vector of B A (Arrow, arXiv 2405.11157)."""

    name = "arrow"
    is_baseline = True
    help = "by how much of the query lies in the direction that each adapter amplifies most"
    routing = "arrow"
    measured = Measured("along its direction")


class Norm(Strategy):
    """Weigh by shares of |scale B A x| at a late query projection (LoGo, arXiv 2511.07129)."""

    name = "norm"
    is_baseline = True
    help = "by what the adapter adds to a late query projection, one weight for all layers"
    measured = Measured("added to q")
    compares = QUERIES

    def plan(self, reading: Reading) -> Plan:
        import numpy as np

        from qaflora_edge.weighing.numbers import normalise

        norms = reading.norms()  # [n_adapter]
        norms = np.repeat(norms[:, None], reading.query.n_layer, axis=1)
        return Plan.mix(normalise(norms), norms)


STRATEGIES = (SpectR(), Arrow(), Norm())
