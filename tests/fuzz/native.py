"""The native library under damaged files: it may refuse them, and must not end the process."""

import os
from functools import cache
from pathlib import Path

import numpy as np

from qaflora_edge.backend.context import Context
from qaflora_edge.backend.model import Model, Pack
from qaflora_edge.formats.adapter_gguf import read_adapter_gguf
from qaflora_edge.formats.gguf_header import read_values

TOKENS = (72, 101, 108, 108)
# The build with sanitizers has asserts, and ggml's are against activations that are not finite.
HAS_ASSERTS = "ASAN_OPTIONS" in os.environ
LARGEST_TAME = 100.0


@cache
def _model(path: Path) -> Model:
    return Model(path, gpu_layers=0)


def use_adapter(base_path: Path, adapter_path: Path) -> None:
    """Load an adapter and decode some tokens with it; the numbers may be of any size."""
    model = _model(base_path)
    with (
        Pack(model, [adapter_path]) as pack,
        Context(model, pack, n_ctx=32, threads=1) as context,
    ):
        if HAS_ASSERTS and not _is_tame(adapter_path):
            return  # loading is all that can be tried
        context.set_weights(np.ones((1, model.n_layer), np.float32))
        context.decode(TOKENS)
        assert context.logits().shape == (model.n_vocab,)


def _is_tame(path: Path) -> bool:
    """Tell whether an adapter leaves activations finite in a tiny base."""
    info = read_adapter_gguf(path)
    return all(  # False for NaN
        max(1.0, abs(info.alpha)) * float(np.abs(read_values(path, tensor)).max()) <= LARGEST_TAME
        for tensor in info.tensors.values()
    )
