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
        self._modules: list[tuple[int, F64]] = []  # layer, scale B A as a matrix [n, n_embd]
        for layer in range(n_layer):
            for name in (f"blk.{layer}.{kind}.weight" for kind in KINDS):
                if name in info.ranks:
                    a, b, scale = read_pair(info, name)
                    self._modules.append((layer, scale * amplified(a, b)))

    def sums(self, inputs: F32) -> F64:
        """Sums over tokens of |scale B A x| of each module: float64 [n_module].

        inputs  [n_token, n_layer, n_embd]  x of the projections
        """
        return np.array(
            [
                np.linalg.norm(inputs[:, layer].astype(np.float64) @ matrix.T, axis=1).sum()
                for layer, matrix in self._modules
            ]
        )

    def of_layers(self, sizes: F64) -> F64:
        """The geometric mean over each layer's modules: [n_module] -> [n_layer], 0 without any."""
        layers = np.array([layer for layer, _ in self._modules])
        with np.errstate(divide="ignore"):  # a module that adds nothing
            logs = np.log(sizes)
        return np.array(
            [
                np.exp(logs[layers == layer].mean()) if (layers == layer).any() else 0.0
                for layer in range(self._n_layer)
            ]
        )
