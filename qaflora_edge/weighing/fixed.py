"""Strategies that do not look at the query: `static`, `single`, `manual` and `base`."""

from collections.abc import Mapping, Sequence

from qaflora_edge.arrays import F32
from qaflora_edge.errors import StrategyError, WeightsError
from qaflora_edge.weighing.strategy import Reading, Strategy

_LARGEST = 3.4028234663852886e38  # of float32


class _Fixed(Strategy):
    """Weigh by adapter -> weight, which parse() gives, whatever the query is; others weigh 0."""

    is_probed = False

    def parse(self, argument: str, adapters: Sequence[str], text: str) -> dict[str, float]:
        return {}

    def plan(self, reading: Reading) -> F32:
        import numpy as np

        query = reading.query
        by_name: Mapping[str, float] = query.argument
        weights = [by_name.get(name, 0.0) for name in query.adapters]
        column = np.array(weights, np.float32)[:, None]
        return np.repeat(column, query.n_layer, axis=1)


class Static(_Fixed):
    """Weigh every adapter 1 / n_adapter: the paper's uniform mix."""

    name = "static"
    is_baseline = True
    help = "all alike"

    def parse(self, argument: str, adapters: Sequence[str], text: str) -> dict[str, float]:
        return {name: 1.0 / len(adapters) for name in adapters}


class Single(_Fixed):
    """Weigh one adapter 1."""

    name = "single"
    help = "one adapter alone"
    argument = "NAME"
    needs_argument = True
    is_base_prefilled = True

    def parse(self, argument: str, adapters: Sequence[str], text: str) -> dict[str, float]:
        return {_checked(argument, adapters, text): 1.0}


class Manual(_Fixed):
    """Weigh by numbers after the colon, applied as they are."""

    name = "manual"
    help = "by given weights, the same at every layer"
    argument = "NAME=W,NAME=W"
    needs_argument = True

    def parse(self, argument: str, adapters: Sequence[str], text: str) -> dict[str, float]:
        weights = {}
        for item in argument.split(","):
            name, _, number = item.partition("=")
            _checked(name, adapters, text)
            if name in weights:
                raise StrategyError(f"Strategy {text!r} names the adapter {name!r} twice.")
            try:
                weight = float(number)
            except ValueError:
                weight = float("nan")
            if not abs(weight) <= _LARGEST:
                raise WeightsError(
                    f"Strategy {text!r}: the weight of {name!r} is {number!r}, expected a finite "
                    "number as in manual:math=0.7,es=0.3."
                )
            weights[name] = weight
        return weights


class Base(_Fixed):
    """Weigh every adapter 0."""

    name = "base"
    help = "the base without any adapter"
    is_base_prefilled = True


STRATEGIES = (Static(), Single(), Manual(), Base())


def _checked(name: str, adapters: Sequence[str], where: str) -> str:
    if name not in adapters:
        raise StrategyError(
            f"Strategy {where!r} names the adapter {name!r}, which is not loaded; "
            f"expected one of: {', '.join(adapters) or 'none is loaded'}."
        )
    return name
