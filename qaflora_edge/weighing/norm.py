"""`norm` (after LoGo, arXiv 2511.07129): by what each adapter adds to a late query projection."""

import re
from collections.abc import Sequence
from typing import Any

from qaflora_edge.errors import StrategyError
from qaflora_edge.weighing.strategy import QUERIES, Measured, Mix, Probe, Query, Strategy


class Norm(Strategy):
    name = "norm"
    help = "by what the adapter adds to a late query projection, one weight for all layers; N: top"
    argument = "N"
    measured = Measured("added to q")
    compares = QUERIES

    def parse(self, argument: str, adapters: Sequence[str], text: str) -> int | None:
        """The N of norm:N, how many adapters weigh more than 0; None for all."""
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


STRATEGIES = (Norm(),)
