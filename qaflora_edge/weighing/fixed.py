"""Strategies that do not look at the query: static, single, manual, base."""

from collections.abc import Sequence
from typing import Any

from qaflora_edge.arrays import F32
from qaflora_edge.errors import StrategyError, WeightsError
from qaflora_edge.weighing.strategy import Probe, Query, Strategy

_LARGEST = 3.4028234663852886e38  # of float32


class _Fixed(Strategy):
    is_probed = False

    def weigh(self, query: Query, probe: Probe, argument: Any) -> F32:
        import numpy as np

        of_adapter = self.weights(query, argument)
        column = np.array([of_adapter.get(name, 0.0) for name in query.adapters], np.float32)
        return np.repeat(column[:, None], query.n_layer, axis=1)

    def weights(self, query: Query, argument: Any) -> dict[str, float]:
        """Give adapter -> weight, the same at every layer; adapters not named weigh 0."""
        raise NotImplementedError


class Static(_Fixed):
    name = "static"
    help = "all alike"

    def weights(self, query: Query, argument: Any) -> dict[str, float]:
        return {name: 1.0 / len(query.adapters) for name in query.adapters}


class Single(_Fixed):
    name = "single"
    help = "one adapter alone"
    argument, needs_argument = "NAME", True

    def parse(self, argument: str, adapters: Sequence[str], text: str) -> str:
        return _known(argument, adapters, text)

    def weights(self, query: Query, argument: Any) -> dict[str, float]:
        return {argument: 1.0}


class Manual(_Fixed):
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
                raise WeightsError(
                    f"Strategy {text!r}: the weight of {name!r} is {number!r}, expected a number "
                    "as in manual:math=0.7,es=0.3."
                ) from None
            if not abs(weights[name]) <= _LARGEST:
                raise WeightsError(
                    f"Strategy {text!r}: the weight of {name!r} is {number}, expected a finite "
                    "number."
                )
        return weights

    def weights(self, query: Query, argument: Any) -> dict[str, float]:
        return dict(argument)


class Base(_Fixed):
    name = "base"
    help = "the base without any adapter"

    def weights(self, query: Query, argument: Any) -> dict[str, float]:
        return {}


STRATEGIES = (Static(), Single(), Manual(), Base())


def _known(name: str, adapters: Sequence[str], where: str) -> str:
    if name not in adapters:
        raise StrategyError(
            f"Strategy {where!r} names the adapter {name!r}, which is not loaded; "
            f"expected one of: {', '.join(adapters) or 'none is loaded'}."
        )
    return name
