"""Strategies to compare with.

Those of other work take one pass of the base: `norm`, `centroid`, `arrow` and `spectr`. `static`,
`single`, `manual` and `base` do not look at the query.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from qaflora_edge.arrays import F32
from qaflora_edge.errors import StrategyError, WeightsError
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

_LARGEST = 3.4028234663852886e38  # of float32
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


class _Fixed(Strategy):
    """Weigh by adapter -> weight, which parse() gives, whatever the query is; others weigh 0."""

    is_probed = False

    def parse(self, argument: str, adapters: Sequence[str], text: str) -> dict[str, float]:
        return {}

    def weigh(self, query: Query, probe: Probe, argument: Mapping[str, float]) -> F32:
        import numpy as np

        column = np.array([argument.get(name, 0.0) for name in query.adapters], np.float32)
        return np.repeat(column[:, None], query.n_layer, axis=1)


class Static(_Fixed):
    """Weigh every adapter 1 / n_adapter: the paper's uniform mix."""

    name = "static"
    help = "all alike"

    def parse(self, argument: str, adapters: Sequence[str], text: str) -> dict[str, float]:
        return {name: 1.0 / len(adapters) for name in adapters}


class Single(_Fixed):
    """Weigh one adapter 1."""

    name = "single"
    help = "one adapter alone"
    argument, needs_argument = "NAME", True
    is_base_prefilled = True

    def parse(self, argument: str, adapters: Sequence[str], text: str) -> dict[str, float]:
        return {_known(argument, adapters, text): 1.0}


class Manual(_Fixed):
    """Weigh by numbers after the colon, applied as they are."""

    name = "manual"
    help = "by given weights, the same at every layer"
    argument, needs_argument = "NAME=W,NAME=W", True

    def parse(self, argument: str, adapters: Sequence[str], text: str) -> dict[str, float]:
        weights: dict[str, float] = {}
        for item in argument.split(","):
            name, _, number = item.partition("=")
            _known(name, adapters, text)
            if name in weights:
                raise StrategyError(f"Strategy {text!r} names the adapter {name!r} twice.")
            try:
                weights[name] = float(number)
            except ValueError:
                weights[name] = float("nan")
            if not abs(weights[name]) <= _LARGEST:
                raise WeightsError(
                    f"Strategy {text!r}: the weight of {name!r} is {number!r}, expected a finite "
                    "number as in manual:math=0.7,es=0.3."
                )
        return weights


class Base(_Fixed):
    """Weigh every adapter 0."""

    name = "base"
    help = "the base without any adapter"
    is_base_prefilled = True


STRATEGIES = (Norm(), Centroid(), Arrow(), SpectR(), Static(), Single(), Manual(), Base())


def _known(name: str, adapters: Sequence[str], where: str) -> str:
    if name not in adapters:
        raise StrategyError(
            f"Strategy {where!r} names the adapter {name!r}, which is not loaded; "
            f"expected one of: {', '.join(adapters) or 'none is loaded'}."
        )
    return name
