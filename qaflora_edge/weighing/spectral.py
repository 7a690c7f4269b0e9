"""`arrow` and `spectr`: by what the adapters' own matrices read of the query, without any data.

Query-level variants of Arrow (arXiv 2405.11157) and SpectR (arXiv 2504.03454). Both route each
token at each module: the weights are softmax over the adapters of |v . x|, v the top right-singular
vector of B A, or of |scale B A x|, x what the module reads. Here x comes from one pass of the base
alone, of the modules q, k and v, and a layer's weights are the mean over the query's tokens and
these modules: one mix for the whole answer, where the published methods mix anew at each token.
"""

from typing import Any

from qaflora_edge.arrays import F64, ArrayLike
from qaflora_edge.weighing.strategy import (
    ADDED,
    KINDS,
    Measured,
    Mix,
    Probe,
    Query,
    Reading,
    Strategy,
)


class _Spectral(Strategy):
    reading: Reading
    compares = KINDS

    def weigh(self, query: Query, probe: Probe, argument: Any) -> Mix:
        return Mix(*probe.routing(self.reading))


class Arrow(_Spectral):
    name = "arrow"
    help = "by how much of the query lies in the direction that each adapter amplifies most"
    reading = "arrow"
    measured = Measured("along its direction")


class SpectR(_Spectral):
    name = "spectr"
    help = "by the size of what each adapter adds to the attention's projections"
    reading = "spectr"
    measured = ADDED


STRATEGIES = (Arrow(), SpectR())


def amplified(a: ArrayLike, b: ArrayLike) -> F64:
    """A matrix P with |P x| = |B A x| for every x: float64 [rank, n_in], or of fewer rows.

    a  [rank, n_in]
    b  [n_out, rank]
    """
    import numpy as np

    _, r = np.linalg.qr(np.asarray(b, np.float64))
    return np.asarray(r @ np.asarray(a, np.float64))


def top_direction(amplified: F64) -> F64:
    """The unit vector v with the largest |P v|, up to its sign: float64 [n_in]."""
    import numpy as np

    return np.asarray(np.linalg.svd(amplified, full_matrices=False)[2][0])
