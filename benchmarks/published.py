"""qaflora's command line with two more published strategies to compare with, `norm` and `arrow`:

python benchmarks/published.py eval demo sums.jsonl --strategies base,static,norm,arrow -o r.jsonl
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from qaflora_edge import Measured, Plan, Reading, Strategy, register_strategy
from qaflora_edge.cli import main
from qaflora_edge.errors import StrategyError
from qaflora_edge.formats.adapter import AdapterInfo, read_pair
from qaflora_edge.weighing.adapter_inputs import module_matrix, on_one_thread, shared_modules
from qaflora_edge.weighing.added import Listener
from qaflora_edge.weighing.numbers import normalise
from qaflora_edge.weighing.published.projections import AttentionInputs
from qaflora_edge.weighing.strategy import KINDS, AdapterMatrices

QUERIES = ("attn_q", "attn_qkv")


class Directions(AttentionInputs):
    """Hold one direction of each module: the unit vector v with the largest |B A v|."""

    strategy = "arrow"

    @staticmethod
    def module(a: Any, b: Any, scale: float) -> Any:
        """Give v, up to its sign: float64 [1, n_embd]."""
        _, _, right = np.linalg.svd(module_matrix(a, b, scale), full_matrices=False)
        return right[:1]


class Arrow(Strategy):
    """Weigh by |v . x|, v the top right-singular vector of B A (Arrow, arXiv 2405.11157)."""

    name = "arrow"
    help = "by how much of the query lies in the direction that each adapter amplifies most"
    measured = Measured("along its direction")
    compares = KINDS
    is_baseline = True

    def plan(self, reading: Reading) -> Plan:
        weights, sizes = reading.listen(Directions)
        return Plan.mix(weights, sizes)


class QueryProjections(AdapterMatrices):
    """Read the query projection of the last block that all adapters adapt.

    Raises StrategyError when there is no such block.
    """

    @on_one_thread()
    def __init__(self, infos: Sequence[AdapterInfo], n_layer: int) -> None:
        common = []
        for layer in range(n_layer):
            for name in shared_modules(infos, layer, QUERIES):
                common.append((layer, name))
        if not common:
            queries = set(QUERIES)
            lacking = [str(info.path) for info in infos if queries.isdisjoint(info.targets)]
            raise StrategyError(
                "Strategy norm compares what adapters add to one query projection, but no block's "
                f"is adapted by all of them ({', '.join(lacking) or 'they adapt different blocks'})"
                "; use another strategy."
            )
        self.layer, name = common[-1]
        self.matrices = [module_matrix(*read_pair(info, name)) for info in infos]

    def listener(self, n_token: int) -> Listener:
        return _Norms(self, n_token)


class _Norms(Listener):
    """Compute |scale B A x| of each adapter at the last token: float64 [n_adapter]."""

    def __init__(self, queries: QueryProjections, n_token: int) -> None:
        self._queries = queries
        self.start = n_token - 1

    def take(self, at: int, inputs: Any) -> None:
        if at <= self.start:  # a thought may follow it
            self._last = inputs[self.start - at]

    @on_one_thread()
    def result(self) -> Any:
        x = self._last[self._queries.layer].astype(np.float64)
        return np.array([np.linalg.norm(matrix @ x) for matrix in self._queries.matrices])


class Norm(Strategy):
    """Weigh by shares of |scale B A x| at a late query projection (LoGo, arXiv 2511.07129)."""

    name = "norm"
    help = "by what the adapter adds to a late query projection, one weight for all layers"
    measured = Measured("added to q")
    compares = QUERIES
    is_baseline = True

    def plan(self, reading: Reading) -> Plan:
        norms = reading.listen(QueryProjections)  # [n_adapter]
        norms = np.repeat(norms[:, None], reading.query.n_layer, axis=1)
        return Plan.mix(normalise(norms), norms)


register_strategy(Arrow())
register_strategy(Norm())
if __name__ == "__main__":
    main()
