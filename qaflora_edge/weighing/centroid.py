"""`centroid`: by how near the query lies to sample texts of each adapter, as the base reads them.

The router of DAM (arXiv 2403.08755): softmax of the cosine similarity of the query's embedding to
each adapter's centroid, at temperature 0.01. An embedding is the mean over a text's tokens of the
base's state after its last block; a centroid is the mean of the embeddings of some texts.
"""

import base64
import binascii
from typing import Any

from qaflora_edge.arrays import F32, F64, ArrayLike
from qaflora_edge.errors import StrategyError
from qaflora_edge.weighing.strategy import Measured, Mix, Probe, Query, Strategy

TEMPERATURE = 0.01  # of DAM's own experiments (its README, --router_temp)


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

        centroids = [query.centroids[name] for name in query.adapters]
        similarity = cosine_similarity(probe.embedding(), centroids)
        weights = softmax(similarity / TEMPERATURE)
        shape = (len(weights), query.n_layer)
        return Mix(*(np.broadcast_to(each[:, None], shape) for each in (weights, similarity)))


STRATEGIES = (Centroid(),)


def cosine_similarity(embedding: ArrayLike, centroids: ArrayLike) -> F64:
    """Cosine of the angle to each centroid: float64 [n_adapter].

    embedding  [n_embd]
    centroids  [n_adapter, n_embd]
    """
    import numpy as np

    x, c = np.asarray(embedding, np.float64), np.asarray(centroids, np.float64)
    return np.asarray(c @ x / (np.linalg.norm(c, axis=-1) * np.linalg.norm(x)))


def centroid_text(centroid: F32) -> str:
    """A centroid [n_embd] as text: base64 of little-endian float32."""
    return base64.b64encode(centroid.astype("<f4").tobytes()).decode("ascii")


def parse_centroid(text: str, n_embd: int) -> F32:
    """Read a centroid [n_embd]; ValueError, which says what it is, for what is none."""
    import numpy as np

    try:
        data = base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(f"no base64 ({error})") from error
    if len(data) != 4 * n_embd:
        raise ValueError(f"of {len(data)} bytes")
    centroid = np.frombuffer(data, "<f4").astype(np.float32)
    if not np.isfinite(centroid).all() or not centroid.any():
        raise ValueError("of values that are not finite, or all 0")
    return centroid
