"""Strategies of other work, with one pass of the base: `norm`, `centroid`, `arrow` and `spectr`.

norm      LoGo (arXiv 2511.07129): |scale B A x| at a late query projection.
centroid  the router of DAM (arXiv 2403.08755): softmax of the cosine similarity of the query's
          embedding to each adapter's centroid, at temperature 0.01. An embedding is the mean over
          a text's tokens of the base's state after its last block; a centroid is the mean of some.
arrow, spectr  query-level variants of Arrow (arXiv 2405.11157) and SpectR (arXiv 2504.03454).
          Both route each token at each module: softmax over the adapters of |v . x|, v the top
          right-singular vector of B A, or of |scale B A x|. Here x is the input of q, k and v in
          the base alone, and a layer's weights are the mean over tokens and modules: one mix for
          the whole answer, where the published methods mix at each token.
"""

import re
from collections.abc import Sequence
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
    name = "norm"
    help = "by what the adapter adds to a late query projection, one weight for all layers; N: top"
    argument = "N"
    measured = Measured("added to q")
    compares = QUERIES

    def parse(self, argument: str, adapters: Sequence[str], text: str) -> int | None:
        """Read the N of norm:N, how many adapters weigh more than 0; None for all."""
        if not argument:
            return None
        if not re.fullmatch(r"[0-9]{1,9}", argument) or int(argument) < 1:
            raise StrategyError(
                f"Strategy {text!r}: {argument!r} is no number of adapters, expected norm or "
                "norm:N with N from 1."
            )
        return int(argument)

    def weigh(self, query: Query, probe: Probe, argument: Any) -> Mix:
        import numpy as np

        from qaflora_edge.weighing.numbers import normalise_top

        norms = probe.norms()
        weights, measure = (
            np.repeat(column.astype(np.float32)[:, None], query.n_layer, axis=1)
            for column in (normalise_top(norms, argument), norms)
        )
        return Mix(weights, measure)


class Centroid(Strategy):
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
        return Mix(*(np.broadcast_to(each[:, None], shape) for each in (weights, similarity)))


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


STRATEGIES = (Norm(), Centroid(), Arrow(), SpectR())
