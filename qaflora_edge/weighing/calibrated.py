"""`calibrated`: an adapter's divergence relative to its usual one, and measuring that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from qaflora_edge.errors import StrategyError
from qaflora_edge.weighing.strategy import Mix, Probe, Query, Strategy

if TYPE_CHECKING:
    from qaflora_edge.weighing.strategy import F64


class Calibrated(Strategy):
    name = "calibrated"
    help = "as qa-flora, relative to each adapter's typical divergence"

    def check(self, argument: Any, query: Query) -> None:
        if query.pool != "last":
            raise StrategyError(
                f"Strategy calibrated needs pool last, found {query.pool}: typical divergences "
                "are measured at the last token."
            )
        missing = [name for name in query.adapters if query.lens not in query.typical.get(name, {})]
        if missing:
            raise StrategyError(
                f"Strategy calibrated needs typical divergences, missing for {', '.join(missing)} "
                f"with lens {query.lens}; measure them with `qaflora bundle calibrate DIR`."
            )

    def weigh(self, query: Query, probe: Probe, argument: Any) -> Mix:
        from qaflora_edge.weighing import numbers

        divergence = probe.divergence()
        typical = [query.typical[name][query.lens] for name in query.adapters]
        return Mix(numbers.normalise(numbers.calibrate(divergence, typical)), divergence)


STRATEGIES = (Calibrated(),)


def measure_typical(
    divergences: Callable[[Sequence[int]], dict[str, F64]],
    adapters: Sequence[str],
    queries: Sequence[Sequence[int]],
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, dict[str, list[float]]]:
    """Measure each adapter against itself.

    divergences  token ids of a query -> lens -> float64 [n_adapter, n_layer]
    queries      token ids of each neutral query
    progress     called with (queries done, queries in all)
    returns      adapter -> lens -> geometric mean of the divergence at each layer
    """
    from qaflora_edge.weighing import numbers

    measured: dict[str, list[F64]] = {lens: [] for lens in numbers.LENSES}
    for done, tokens in enumerate(queries, 1):
        for lens, divergence in divergences(tokens).items():
            measured[lens].append(divergence)
        if progress is not None:
            progress(done, len(queries))
    typical = {lens: numbers.typical_divergence(measured[lens]) for lens in numbers.LENSES}
    return {
        name: {lens: [float(x) for x in typical[lens][ia]] for lens in numbers.LENSES}
        for ia, name in enumerate(adapters)
    }
