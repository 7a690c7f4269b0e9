"""Strategies of other work, with one pass of the base: `norm`, `centroid`, `arrow` and `spectr`."""

from typing import Any

from qaflora_edge.errors import StrategyError
from qaflora_edge.weighing.strategy import (
    ADDED,
    KINDS,
    QUERIES,
    Measured,
    Mix,
    Probe,
    Query,
    Reading,
    Strategy,
)

TEMPERATURE = 0.01  # of DAM's own experiments (its README, --router_temp)


class Norm(Strategy):
    """Weigh by shares of |scale B A x| at a late query projection (LoGo, arXiv 2511.07129)."""

    name = "norm"
    help = "by what the adapter adds to a late query projection, one weight for all layers"
    measured = Measured("added to q")
    compares = QUERIES

    def weigh(self, query: Query, probe: Probe, argument: Any) -> Mix:
        import numpy as np

        from qaflora_edge.weighing.numbers import normalise

        norms = np.repeat(probe.norms()[:, None], query.n_layer, axis=1)
        return Mix(normalise(norms), norms)


class Centroid(Strategy):
    """Weigh by the softmax of cosine similarities to each adapter's centroid, divided by 0.01.

    The router of DAM (arXiv 2403.08755). An embedding is the mean over a text's tokens of the
    base's state after its last block; a centroid is the mean of sample texts' embeddings.
    """

    name = "centroid"
    help = "by how near the query is to sample texts of each adapter (`qaflora bundle samples`)"
    measured = Measured("similarity")

    def check(self, argument: Any, query: Query) -> None:
        missing = [name for name in query.adapters if name not in query.centroids]
        if missing:
            raise StrategyError(
                f"Strategy centroid needs sample texts of each adapter, missing for "
                f"{', '.join(missing)}; give them with `qaflora bundle samples DIR ADAPTER FILE`."
            )

    def weigh(self, query: Query, probe: Probe, argument: Any) -> Mix:
        import numpy as np

        from qaflora_edge.weighing.numbers import softmax

        x = probe.embedding().astype(np.float64)
        c = np.array([query.centroids[name] for name in query.adapters], np.float64)
        similarity = c @ x / (np.linalg.norm(c, axis=-1) * np.linalg.norm(x))
        weights = softmax(similarity / TEMPERATURE)
        shape = (len(weights), query.n_layer)
        layers, measure = (np.broadcast_to(x[:, None], shape) for x in (weights, similarity))
        return Mix(layers, measure)


class _Spectral(Strategy):
    """Weigh by the mean over tokens and modules of softmax over the adapters of a size.

    x is the input of q, k and v in the base alone. The published methods mix at each token; here
    one mix holds for the whole answer.
    """

    reading: Reading
    compares = KINDS

    def weigh(self, query: Query, probe: Probe, argument: Any) -> Mix:
        return Mix(*probe.routing(self.reading))


class Arrow(_Spectral):
    """Weigh by |v . x|, v the top right-singular vector of B A (Arrow, arXiv 2405.11157)."""

    name = "arrow"
    help = "by how much of the query lies in the direction that each adapter amplifies most"
    reading = "arrow"
    measured = Measured("along its direction")


class SpectR(_Spectral):
    """Weigh by |scale B A x| (SpectR, arXiv 2504.03454)."""

    name = "spectr"
    help = "by the size of what each adapter adds to the attention's projections"
    reading = "spectr"
    measured = ADDED


STRATEGIES = (Norm(), Centroid(), Arrow(), SpectR())
