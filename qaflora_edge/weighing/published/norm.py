"""The strategy `norm`: what an adapter adds to a late query projection."""

from qaflora_edge.weighing.plan import Plan
from qaflora_edge.weighing.strategy import QUERIES, Measured, Reading, Strategy


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


STRATEGIES = (Norm(),)
