"""The native library under damaged files: it may refuse them, and must not end the process."""

from functools import cache
from pathlib import Path

import numpy as np

from qaflora_edge.runtime import Context, Model, Pack

TOKENS = (72, 101, 108, 108)


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
        context.set_weights(np.ones((1, model.n_layer), np.float32))
        context.decode(TOKENS)
        assert context.logits().shape == (model.n_vocab,)
