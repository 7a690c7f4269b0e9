"""How much each adapter would add to the attention of the base, for the strategy `two-place`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qaflora_edge.formats.adapter_gguf import AdapterInfo, read_adapter_gguf, read_pair
from qaflora_edge.weighing.attention_inputs import KINDS
from qaflora_edge.weighing.spectral import amplified

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]


class AttentionSizes:
    """The matrices of one adapter's modules q, k and v, whichever it has.

    Other adapters do not matter, so that what is usual of one can be kept.
    """

    def __init__(self, adapter: Path | AdapterInfo, n_layer: int) -> None:
        info = adapter if isinstance(adapter, AdapterInfo) else read_adapter_gguf(adapter)
        self._n_layer = n_layer
        # layer -> its modules' matrices beside each other [n_embd, n], where each begins
        self._matrices: dict[int, tuple[F32, list[int]]] = {}
        self._layers: list[int] = []  # of each module
        for layer in range(n_layer):
            names = [name for kind in KINDS if (name := f"blk.{layer}.{kind}.weight") in info.ranks]
            if not names:
                continue
            matrices = [
                scale * amplified(a, b) for a, b, scale in (read_pair(info, n) for n in names)
            ]
            starts = np.cumsum([0, *(len(matrix) for matrix in matrices[:-1])]).tolist()
            stacked = np.concatenate(matrices).T.astype(np.float32, order="C")
            self._matrices[layer] = stacked, starts
            self._layers += [layer] * len(names)

    def sums(self, inputs: F32) -> F64:
        """Sums over tokens of |scale B A x| of each module: float64 [n_module].

        inputs  [n_token, n_layer, n_embd]  x of the projections
        """
        sums: list[float] = []
        for layer, (matrix, starts) in self._matrices.items():
            squares = np.square(inputs[:, layer] @ matrix)
            sums += np.sqrt(np.add.reduceat(squares, starts, axis=1)).sum(0, np.float64).tolist()
        return np.array(sums)

    def of_layers(self, sizes: F64) -> F64:
        """The geometric mean over each layer's modules: [n_module] -> [n_layer], 0 without any."""
        layers = np.array(self._layers)
        with np.errstate(divide="ignore"):  # a module that adds nothing
            logs = np.log(sizes)
        return np.array(
            [
                np.exp(logs[layers == layer].mean()) if (layers == layer).any() else 0.0
                for layer in range(self._n_layer)
            ]
        )
