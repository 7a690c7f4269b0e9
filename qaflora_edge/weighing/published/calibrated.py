"""The strategy `calibrated`: divergences relative to what is typical of each adapter."""

from qaflora_edge.config import PROBING, SHAPING
from qaflora_edge.weighing.plan import Plan
from qaflora_edge.weighing.published.qa_flora import DISTANCES
from qaflora_edge.weighing.strategy import Query, Reading, Strategy


class Calibrated(Strategy):
    """Weigh by KL divided by the adapter's typical KL over neutral prompts, layer by layer.

    Our own: an adapter that moves every prompt far is not heavier for it.
    """

    name = "calibrated"
    is_baseline = True
    help = "as qa-flora, relative to each adapter's typical divergence"
    measured = DISTANCES["kl"]
    options = (*SHAPING, *PROBING)
    needs_typical = ("norm", "raw", "question_norm", "question_raw")  # any lens, any pool

    def check(self, query: Query) -> None:
        from qaflora_edge.weighing.calibration import check_typical

        place = "" if query.pool == "last" else f" at pool {query.pool}"
        check_typical(self.name, query, [_key(query)], f"with lens {query.lens}{place}")

    def plan(self, reading: Reading) -> Plan:
        from qaflora_edge.weighing import numbers

        query = reading.query
        divergence = reading.divergence()
        key = _key(query)
        typical = [query.typical[name][key] for name in query.adapters]
        relative = numbers.calibrate(divergence, typical)
        return Plan.mix(numbers.normalise(relative), divergence)


def _key(query: Query) -> str:
    """Name what is typical under the query's lens and pool, as in calibration.LAYERS."""
    if query.pool == "last":
        return query.lens
    return f"question_{query.lens}"


STRATEGIES = (Calibrated(),)
