"""`fitted`: the weights that `qaflora fit` found on examples of a task, whatever the query."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qaflora_edge.errors import StrategyError
from qaflora_edge.weighing.strategy import Probe, Query, Strategy

if TYPE_CHECKING:
    from qaflora_edge.weighing.strategy import F32


class Fitted(Strategy):
    name = "fitted"
    help = "by the weights that `qaflora fit` found on a task's examples"
    argument = "NAME"
    is_probed = False

    def check(self, argument: Any, query: Query) -> None:
        known = ", ".join(f"fitted:{name}" for name in query.fitted)
        if not query.fitted:
            raise StrategyError(
                "Strategy fitted needs weights that were fitted, and the bundle has none; find "
                "them with `qaflora fit DIR TASK.jsonl`."
            )
        if argument not in query.fitted and (argument or len(query.fitted) > 1):
            written = f"fitted:{argument}" if argument else "fitted"
            raise StrategyError(f"Strategy {written!r} is not one of this bundle's: {known}.")
        missing = [name for name in _weights(argument, query) if name not in query.adapters]
        if missing:
            raise StrategyError(
                f"Strategy {self.name} was fitted with {', '.join(missing)}, and in use are "
                f"{', '.join(query.adapters) or 'none'}; use all that it was fitted with, or fit "
                "again with `qaflora fit --adapters`."
            )

    def weigh(self, query: Query, probe: Probe, argument: Any) -> F32:
        import numpy as np

        weights = _weights(argument, query)
        column = np.array([weights.get(name, 0.0) for name in query.adapters], np.float32)
        return np.repeat(column[:, None], query.n_layer, axis=1)


STRATEGIES = (Fitted(),)


def _weights(name: str, query: Query) -> dict[str, float]:
    """Adapter -> weight, of those that weigh something."""
    found = query.fitted[name or next(iter(query.fitted))]
    return {adapter: weight for adapter, weight in found.items() if weight}
