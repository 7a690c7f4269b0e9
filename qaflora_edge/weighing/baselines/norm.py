"""The strategy `norm`: what an adapter adds to a late query projection."""

from typing import Any

from qaflora_edge.weighing.strategy import QUERIES, Measured, Mix, Probe, Query, Strategy


class Norm(Strategy):
    """Weigh by shares of |scale B A x| at a late query projection (LoGo, arXiv 2511.07129)."""

    name = "norm"
    is_baseline = True
    help = "by what the adapter adds to a late query projection, one weight for all layers"
    measured = Measured("added to q")
    compares = QUERIES

    def weigh(self, query: Query, probe: Probe, argument: Any) -> Mix:
        import numpy as np

        from qaflora_edge.weighing.numbers import normalise

        norms = probe.norms()  # [n_adapter]
        norms = np.repeat(norms[:, None], query.n_layer, axis=1)
        return Mix(normalise(norms), norms)


STRATEGY = Norm()
