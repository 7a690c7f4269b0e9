"""`calibrated`: an adapter's divergence relative to its usual one."""

from __future__ import annotations

from typing import Any

from qaflora_edge.config import PROBING, SHAPING
from qaflora_edge.errors import StrategyError
from qaflora_edge.weighing.strategy import Mix, Probe, Query, Strategy


class Calibrated(Strategy):
    name = "calibrated"
    help = "as qa-flora, relative to each adapter's typical divergence"
    options = (*SHAPING, *PROBING)
    needs_typical = True

    def check(self, argument: Any, query: Query) -> None:
        if query.pool == "mean":
            raise StrategyError(
                "Strategy calibrated needs pool last or question, found mean: typical divergences "
                "are measured there only."
            )
        place = "" if query.pool == "last" else f" at pool {query.pool}"
        check_typical(self.name, query, [_key(query)], f"with lens {query.lens}{place}")

    def weigh(self, query: Query, probe: Probe, argument: Any) -> Mix:
        from qaflora_edge.weighing import numbers

        divergence = probe.divergence()
        typical = [query.typical[name][_key(query)] for name in query.adapters]
        return Mix(numbers.normalise(numbers.calibrate(divergence, typical)), divergence)


STRATEGIES = (Calibrated(),)


def check_typical(strategy: str, query: Query, keys: list[str], how: str) -> None:
    """Raise StrategyError where an adapter lacks one of some keys of `typical`."""
    missing = [
        name
        for name in query.adapters
        if not all(key in query.typical.get(name, {}) for key in keys)
    ]
    if missing:
        raise StrategyError(
            f"Strategy {strategy} needs typical divergences, missing for {', '.join(missing)} "
            f"{how}; measure them with `qaflora bundle calibrate DIR`."
        )


def _key(query: Query) -> str:
    return query.lens if query.pool == "last" else f"question_{query.lens}"
