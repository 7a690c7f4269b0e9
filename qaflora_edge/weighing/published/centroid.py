"""The strategy `centroid`: how near a query is to sample texts of each adapter."""

import base64
import binascii

from qaflora_edge.arrays import F32
from qaflora_edge.errors import StrategyError
from qaflora_edge.weighing.plan import Plan
from qaflora_edge.weighing.strategy import Measured, Query, Reading, Strategy

TEMPERATURE = 0.01  # of DAM's own experiments (its README, --router_temp)


class Centroid(Strategy):
    """Weigh by the softmax of cosine similarities to each adapter's centroid, divided by 0.01.

    The router of DAM (arXiv 2403.08755). An embedding is the mean over a text's tokens of the
    base's state after its last block; a centroid is the mean of sample texts' embeddings.
    """

    name = "centroid"
    is_baseline = True
    help = "by how near the query is to sample texts of each adapter (`qaflora bundle samples`)"
    measured = Measured("similarity")

    def check(self, query: Query) -> None:
        missing = [name for name in query.adapters if name not in query.centroids]
        if missing:
            raise StrategyError(
                f"Strategy centroid needs sample texts of each adapter, missing for "
                f"{', '.join(missing)}; give them with `qaflora bundle samples DIR ADAPTER FILE`."
            )

    def plan(self, reading: Reading) -> Plan:
        import numpy as np

        from qaflora_edge.weighing.numbers import softmax

        query = reading.query
        embedding = reading.embedding().astype(np.float64)  # [n_embd]
        rows = [query.centroids[name] for name in query.adapters]
        centroids = np.array(rows, np.float64)  # [n_adapter, n_embd]
        lengths = np.linalg.norm(centroids, axis=-1) * np.linalg.norm(embedding)
        similarity = centroids @ embedding / lengths  # [n_adapter]
        weights = softmax(similarity / TEMPERATURE)
        shape = (len(weights), query.n_layer)
        by_layer = np.broadcast_to(weights[:, None], shape)
        return Plan.mix(by_layer, np.broadcast_to(similarity[:, None], shape))


STRATEGIES = (Centroid(),)


def centroid_text(centroid: F32) -> str:
    """Write a centroid [n_embd] as text: base64 of little-endian float32."""
    return base64.b64encode(centroid.astype("<f4").tobytes()).decode("ascii")


def parse_centroid(text: str, n_embd: int) -> F32:
    """Read a centroid [n_embd]; ValueError says what is wrong with it."""
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
