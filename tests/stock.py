"""llama.cpp's own way to apply adapters, for comparison: no pack, no hook in use.

A context made by llama_init_from_model has no qaflora state; its graphs are upstream's.
"""

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tiny import F32, TinyAdapter, TinyBase, write_tiny_base

from qaflora_edge.backend import library as native
from qaflora_edge.backend.model import Model


class StockContext:
    """One sequence, F32 KV, no flash attention, adapters with one scale each."""

    def __init__(self, model: Model, *, n_ctx: int = 256) -> None:
        self._lib, _ = native.load()
        self._model = model
        params = self._lib.llama_context_default_params()
        params.n_ctx = params.n_batch = n_ctx
        params.type_k = params.type_v = 0
        params.flash_attn_type = 0
        params.n_threads = params.n_threads_batch = 2
        self.pointer = self._lib.llama_init_from_model(model._pointer, params)
        assert self.pointer

    def can_load(self, path: Path) -> bool:
        """Whether llama.cpp's own code takes an adapter."""
        return bool(self._lib.llama_adapter_lora_init(self._model._pointer, str(path).encode()))

    def set_adapters(self, paths: Sequence[Path], scales: Sequence[float]) -> None:
        adapters = [
            self._lib.llama_adapter_lora_init(self._model._pointer, str(path).encode())
            for path in paths
        ]
        assert all(adapters)
        pointers = (ctypes.c_void_p * len(adapters))(
            *(ctypes.cast(adapter, ctypes.c_void_p) for adapter in adapters)
        )
        first = ctypes.cast(pointers, ctypes.POINTER(ctypes.POINTER(ctypes.c_void_p)))
        self._keep = pointers
        n = len(scales)
        array = (ctypes.c_float * n)(*scales)
        assert self._lib.llama_set_adapters_lora(self.pointer, first, n, array) == 0

    def decode(self, tokens: Sequence[int]) -> F32:
        """Logits [n_vocab] after the tokens, which continue what was decoded before."""
        array = (ctypes.c_int32 * len(tokens))(*tokens)
        batch = self._lib.llama_batch_get_one(array, len(tokens))
        assert self._lib.llama_decode(self.pointer, batch) == 0
        logits = self._lib.llama_get_logits_ith(self.pointer, -1)
        return np.ctypeslib.as_array(logits, shape=(self._model.n_vocab,)).copy()

    def close(self) -> None:
        self._lib.llama_free(self.pointer)


def layer_of(name: str, n_layer: int) -> int:
    """The layer whose weights a tensor follows: the embedding the first, the head the last."""
    if name.startswith("blk."):
        return int(name.split(".")[1])
    return 0 if name == "token_embd.weight" else n_layer - 1


def merged_tensors(
    base: TinyBase, adapters: Sequence[TinyAdapter], weights: NDArray[np.floating]
) -> Mapping[str, F32]:
    """W + sum_j weights[j, layer] * delta_j in float64, for each adapted matrix."""
    merged = {}
    for name in {name for adapter in adapters for name in adapter.a}:
        total = base.tensors[name].astype(np.float64)
        for ia, adapter in enumerate(adapters):
            if name in adapter.a:
                delta = adapter.delta(name)
                if name == "token_embd.weight":
                    delta = delta.reshape(total.shape)
                total = total + weights[ia, layer_of(name, base.n_layer)] * delta
        merged[name] = total.astype(np.float32)
    return merged


def write_merged(
    path: Path,
    base: TinyBase,
    adapters: Sequence[TinyAdapter],
    weights: NDArray[np.floating],
    **options: object,
) -> TinyBase:
    """A base of the same seed and options with the weighed adapters merged into it."""
    replace = merged_tensors(base, adapters, weights)
    return write_tiny_base(path, base.arch, replace=replace, **options)  # type: ignore[arg-type]
