"""Probe contexts: states captured after every block, and read through the base's head."""

from typing import Any

import numpy as np

from qaflora_edge.arrays import F32, F64
from qaflora_edge.backend import library
from qaflora_edge.backend.context import Context
from qaflora_edge.backend.model import Model, Pack
from qaflora_edge.config import MAX_CTX
from qaflora_edge.errors import BackendError


class ProbeContext(Context):
    """Run the same tokens in all sequences and capture their states; compute no logits.

    is_differential  see method: sequence 0 is the base, the others run the same tokens
    """

    def __init__(
        self,
        model: Model,
        pack: Pack,
        *,
        n_seq: int = 1,
        is_differential: bool = False,
        **options: Any,
    ) -> None:
        flags = library.CONTEXT_PROBE
        flags |= library.CONTEXT_DIFFERENTIAL if is_differential else 0
        super().__init__(model, pack, n_seq=n_seq, n_output=MAX_CTX, flags=flags, **options)

    def states(self, seq: int) -> F32:
        """Give the states of one sequence after each block: float32 [n_layer, n_embd]."""
        states = np.empty((self._model.n_layer, self._model.n_embd), np.float32)
        return self._captured(self._functions.get_states, seq, states)

    def divergence(self, base: F32, adapted: F32, lens: str) -> F64:
        """Compute the KL of the base's next-token distribution to each adapter's, in nats.

        base     [n_layer, n_embd]             states without adapter
        adapted  [n_adapter, n_layer, n_embd]  states with one adapter each
        returns  float64 [n_adapter, n_layer], >= 0
        """
        base = np.ascontiguousarray(base, np.float32)
        adapted = np.ascontiguousarray(adapted, np.float32)
        result = np.zeros(adapted.shape[:2], np.float64)
        if not self._functions.divergence(
            self._pointer,
            library.LENS[lens],
            len(adapted),
            base.ctypes.data,
            adapted.ctypes.data,
            result.ctypes.data,
        ):
            self._check_cancelled()
            raise BackendError(f"Divergences cannot be computed: {library.last_error()}.")
        return result
