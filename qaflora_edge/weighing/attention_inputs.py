"""What each adapter's q, k and v modules read of a query, for the strategies `arrow`, `spectr`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qaflora_edge.errors import StrategyError
from qaflora_edge.formats.adapter_gguf import AdapterInfo, read_adapter_gguf, read_pair
from qaflora_edge.weighing.numbers import softmax
from qaflora_edge.weighing.spectral import amplified, top_direction
from qaflora_edge.weighing.strategy import Reading

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

KINDS = ("attn_q", "attn_k", "attn_v", "attn_qkv")  # they read the same input


class AttentionInputs:
    """The matrices of the attention's projections that all adapters adapt, and sums over tokens.

    adapters  their files, or what was read of them before
    reading   "arrow": one direction of each module, "spectr": all of them, with their scales

    Raises StrategyError when the adapters have no such module in common.
    """

    def __init__(
        self, adapters: Sequence[Path | AdapterInfo], n_layer: int, reading: Reading
    ) -> None:
        infos = [a if isinstance(a, AdapterInfo) else read_adapter_gguf(a) for a in adapters]
        self._modules: dict[int, list[list[F64]]] = {}  # layer -> module -> adapter -> [n, n_embd]
        for layer in range(n_layer):
            names = [f"blk.{layer}.{kind}.weight" for kind in KINDS]
            if common := [name for name in names if all(name in info.ranks for info in infos)]:
                self._modules[layer] = [
                    [_read(info, name, reading) for info in infos] for name in common
                ]
        if not self._modules:
            raise StrategyError(
                f"Strategy {reading} compares what adapters read at the attention's projections, "
                f"but no block has one ({', '.join(KINDS)}) that all of them adapt; use another "
                "strategy."
            )
        self._n_layer, self._n_adapter = n_layer, len(infos)

    def sums(self, inputs: F32) -> F64:
        """Sums over tokens of each layer's weights and of what they come from.

        inputs   [n_token, n_layer, n_embd]  x of the projections
        returns  float64 [2, n_adapter, n_layer], means over a layer's modules; a layer without any
                 has the mean over the others
        """
        sums = np.zeros((2, self._n_adapter, self._n_layer))
        for layer, modules in self._modules.items():
            x = inputs[:, layer].astype(np.float64)
            for matrices in modules:
                sizes = np.stack([np.linalg.norm(x @ m.T, axis=1) for m in matrices])
                sums[0, :, layer] += softmax(sizes).sum(axis=1) / len(modules)
                sums[1, :, layer] += sizes.sum(axis=1) / len(modules)
        read = list(self._modules)
        others = [layer for layer in range(self._n_layer) if layer not in self._modules]
        sums[:, :, others] = sums[:, :, read].mean(axis=2, keepdims=True)
        return sums


def _read(info: AdapterInfo, name: str, reading: Reading) -> F64:
    """A matrix [n, n_embd] whose product with x is as long as what the module makes of x."""
    a, b, scale = read_pair(info, name)
    matrix = amplified(a, b)
    return top_direction(matrix)[None] if reading == "arrow" else scale * matrix
