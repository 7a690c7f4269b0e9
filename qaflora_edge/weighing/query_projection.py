"""What each adapter adds to the query projection of a late block, for the strategy `norm`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qaflora_edge.errors import StrategyError
from qaflora_edge.formats.adapter_gguf import AdapterInfo, read_adapter_gguf, read_pair

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

_NAMES = ("blk.{}.attn_q.weight", "blk.{}.attn_qkv.weight")


class QueryProjections:
    """The query projection's A and B of the last block that all adapters adapt.

    adapters  their files, or what was read of them before

    Raises StrategyError when there is no such block.
    """

    def __init__(self, adapters: Sequence[Path | AdapterInfo], n_layer: int) -> None:
        infos = [a if isinstance(a, AdapterInfo) else read_adapter_gguf(a) for a in adapters]
        self.layer, name = _last_common(infos, n_layer)
        self._pairs = [read_pair(info, name) for info in infos]

    def norms(self, inputs: F32) -> F64:
        """|scale B A x| of each adapter: float64 [n_adapter].

        inputs  [n_layer, n_embd]  x at every layer
        """
        x = inputs[self.layer].astype(np.float64)
        return np.array(
            [scale * np.linalg.norm(b @ (a @ x)) for a, b, scale in self._pairs], np.float64
        )


def _last_common(infos: Sequence[AdapterInfo], n_layer: int) -> tuple[int, str]:
    for layer in reversed(range(n_layer)):
        for name in (template.format(layer) for template in _NAMES):
            if all(name in info.ranks for info in infos):
                return layer, name
    lacking = [
        str(info.path)
        for info in infos
        if not any(kind in info.targets for kind in ("attn_q", "attn_qkv"))
    ]
    raise StrategyError(
        "Strategy norm compares what adapters add to one query projection, but no block's is "
        f"adapted by all of them ({', '.join(lacking) or 'they adapt different blocks'}); "
        "use another strategy."
    )
