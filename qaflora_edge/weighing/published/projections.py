"""Projections that all adapters adapt, for `spectr`."""

from collections.abc import Sequence

import numpy as np

from qaflora_edge.arrays import F32, F64
from qaflora_edge.errors import StrategyError
from qaflora_edge.formats.adapter import AdapterInfo, read_pair
from qaflora_edge.weighing.adapter_inputs import module_matrix, on_one_thread, shared_modules
from qaflora_edge.weighing.added import Listener
from qaflora_edge.weighing.numbers import softmax
from qaflora_edge.weighing.strategy import KINDS, AdapterMatrices


class _Weights(Listener):
    start = 0

    def __init__(self, attention: "AttentionInputs", n_token: int) -> None:
        self._attention = attention
        self._end = n_token
        self._sums = np.zeros(())
        self._n_token = 0

    def take(self, at: int, inputs: F32) -> None:
        inputs = inputs[: max(0, self._end - at)]  # a thought may follow them
        self._sums = self._sums + self._attention.sums(inputs)
        self._n_token += len(inputs)

    def result(self) -> tuple[F64, F64]:
        weights, sizes = self._sums / self._n_token
        return weights, sizes


class AttentionInputs(AdapterMatrices):
    """Read attention projections that all adapters adapt.

    Its listener gives two float64 [n_adapter, n_layer]: weights, and what they are shares of.

    Raises StrategyError when the adapters have no such module in common.
    """

    strategy = "spectr"
    module = staticmethod(module_matrix)

    @on_one_thread()
    def __init__(self, infos: Sequence[AdapterInfo], n_layer: int) -> None:
        self._modules: dict[int, list[list[F64]]] = {}  # layer -> module -> adapter -> [n, n_embd]
        for layer in range(n_layer):
            for name in shared_modules(infos, layer, KINDS):
                matrices = [self.module(*read_pair(info, name)) for info in infos]
                self._modules.setdefault(layer, []).append(matrices)
        if not self._modules:
            raise StrategyError(
                f"Strategy {self.strategy} compares what adapters read at the attention's "
                f"projections, but no block has one ({', '.join(KINDS)}) that all of them adapt; "
                "use another strategy."
            )
        self._n_layer = n_layer
        self._n_adapter = len(infos)

    def listener(self, n_token: int) -> Listener:
        return _Weights(self, n_token)

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
