"""Projections that all adapters adapt, for `arrow`, `spectr` and `norm`."""

from collections.abc import Sequence

import numpy as np

from qaflora_edge.arrays import F32, F64
from qaflora_edge.errors import StrategyError
from qaflora_edge.formats.adapter import AdapterInfo, read_pair
from qaflora_edge.weighing.adapter_inputs import module_matrix, on_one_thread, shared_modules
from qaflora_edge.weighing.numbers import softmax
from qaflora_edge.weighing.strategy import KINDS, QUERIES, Routing


def _direction(matrix: F64) -> F64:
    """Give the unit vector v with the largest |P v|, up to its sign: [1, n_embd]."""
    _, _, right = np.linalg.svd(matrix, full_matrices=False)
    return np.asarray(right[:1])


class AttentionInputs:
    """Read attention projections that all adapters adapt, for `arrow` and `spectr`.

    routing   "arrow": one direction of each module; "spectr": all, with their scales

    Raises StrategyError when the adapters have no such module in common.
    """

    @on_one_thread()
    def __init__(self, infos: Sequence[AdapterInfo], n_layer: int, routing: Routing) -> None:
        self._modules: dict[int, list[list[F64]]] = {}  # layer -> module -> adapter -> [n, n_embd]
        for layer in range(n_layer):
            for name in shared_modules(infos, layer, KINDS):
                matrices = [module_matrix(*read_pair(info, name)) for info in infos]
                if routing == "arrow":
                    matrices = list(map(_direction, matrices))
                self._modules.setdefault(layer, []).append(matrices)
        if not self._modules:
            raise StrategyError(
                f"Strategy {routing} compares what adapters read at the attention's projections, "
                f"but no block has one ({', '.join(KINDS)}) that all of them adapt; use another "
                "strategy."
            )
        self._n_layer = n_layer
        self._n_adapter = len(infos)

    @on_one_thread()
    def sums(self, inputs: F32) -> F64:
        """Sum each layer's weights and their measure over tokens.

        inputs   [n_token, n_layer, n_embd]  x of the projections
        returns  float64 [2, n_adapter, n_layer], means over a layer's modules; a layer without any
                 gets the mean over the others
        """
        sums = np.zeros((2, self._n_adapter, self._n_layer))
        weights, measure = sums
        for layer, modules in self._modules.items():
            x = inputs[:, layer].astype(np.float64)  # [n_token, n_embd]
            n_module = len(modules)
            for matrices in modules:
                rows = []
                for matrix in matrices:
                    output = x @ matrix.T
                    rows.append(np.linalg.norm(output, axis=1))
                sizes = np.stack(rows)  # [n_adapter, n_token]
                shares = softmax(sizes)
                weights[:, layer] += shares.sum(axis=1) / n_module
                measure[:, layer] += sizes.sum(axis=1) / n_module
        read = list(self._modules)
        others = [layer for layer in range(self._n_layer) if layer not in self._modules]
        sums[:, :, others] = sums[:, :, read].mean(axis=2, keepdims=True)
        return sums


class QueryProjections:
    """Read the query projection of the last block that all adapters adapt, for `norm`.

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
        self._layer, name = common[-1]
        self._matrices = [module_matrix(*read_pair(info, name)) for info in infos]

    @on_one_thread()
    def norms(self, inputs: F32) -> F64:
        """Compute |scale B A x| of each adapter: float64 [n_adapter].

        inputs  [n_layer, n_embd]  x at every layer
        """
        x = inputs[self._layer].astype(np.float64)
        sizes = [np.linalg.norm(matrix @ x) for matrix in self._matrices]
        return np.array(sizes)
