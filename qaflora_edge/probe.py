"""The probe: one query through the base and through each adapter alone, in one batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qaflora_edge import fusion as fuse
from qaflora_edge.runtime import Context, Model, Pack

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

_N_CTX_MIN = 256  # tokens; the context grows by doubling


class Prober:
    """Sequences of one context: the base first, then each adapter alone at weight 1.

    The context is made when first needed and replaced by a larger one for a longer query. The
    states of the last query are kept, so that two measures of one query cost one pass.
    """

    def __init__(self, model: Model, pack: Pack, options: dict[str, Any]) -> None:
        self._model, self._pack, self._options = model, pack, options
        self._context: Context | None = None
        self._last: tuple[tuple[int, ...], str, F32] | None = None

    @property
    def n_layer(self) -> int:
        return self._model.n_layer

    def close(self) -> None:
        if self._context is not None:
            self._context.close()
            self._context = None
        self._last = None

    def states(self, tokens: Sequence[int], pool: str) -> F32:
        """States after each block: float32 [1 + n_adapter, n_layer, n_embd], the base first.

        pool  "last" token of the query, or the "mean" state over its tokens
        """
        key = tuple(tokens)
        if self._last is not None and self._last[:2] == (key, pool):
            return self._last[2]
        context = self._room_for(len(tokens))
        context.clear()
        context.capture_begin(pool)
        context.decode(tokens, outputs="last" if pool == "last" else "all")
        states = np.stack([context.states(seq) for seq in range(context.n_seq)])
        self._last = (key, pool, states)
        return states

    def divergence(self, tokens: Sequence[int], kind: str, lens: str, pool: str) -> F64:
        """How far each adapter moves the base: float64 [n_adapter, n_layer].

        kind  "cosine" and "euclidean" distances of states, else KL in nats through the lens
        """
        states = self.states(tokens, pool)
        if kind == "cosine":
            return fuse.cosine_distance(states[0], states[1:])
        if kind == "euclidean":
            return fuse.euclidean_distance(states[0], states[1:])
        return self._room_for(len(tokens)).divergence(states[0], states[1:], lens)

    def _room_for(self, n_token: int) -> Context:
        if self._context is not None and self._context.n_ctx >= n_token:
            return self._context
        n_ctx = _N_CTX_MIN
        while n_ctx < n_token:
            n_ctx *= 2
        self.close()
        n_adapter = self._pack.n_adapter
        context = Context(
            self._model,
            self._pack,
            n_ctx=n_ctx,
            n_seq=1 + n_adapter,
            probe=True,
            differential=n_adapter > 0,
            **self._options,
        )
        for ia in range(n_adapter):
            alone = np.zeros((n_adapter, self._model.n_layer), np.float32)
            alone[ia] = 1.0
            context.set_weights(alone, seq=1 + ia)
        self._context = context
        return context
