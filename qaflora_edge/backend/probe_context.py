"""Probe contexts: states captured after every block, and read through the base's head."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qaflora_edge.arrays import F32, F64
from qaflora_edge.backend import library
from qaflora_edge.backend.context import Context
from qaflora_edge.backend.model import Model, Pack
from qaflora_edge.config import MAX_CTX
from qaflora_edge.errors import BackendError


@dataclass(frozen=True)
class KvState:
    """Copy the KV state of a context's sequences, which have the same tokens.

    tokens     ids
    sequences  uint8 [n_byte] of each
    weights    hash of the weights that each was computed under
    """

    tokens: list[int]
    sequences: list[NDArray[np.uint8]]
    weights: list[bytes]

    @property
    def n_byte(self) -> int:
        """Count the bytes of all sequences."""
        return sum(data.size for data in self.sequences)


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

    def kv_state(self) -> KvState:
        """Copy the KV state, for a context made with the same options."""
        sequences = [self._sequence(seq) for seq in self._held()]
        return KvState(
            list(self.tokens[0]), sequences, [self._weights[seq] for seq in self._held()]
        )

    @property
    def n_kv_byte(self) -> int:
        """Give the size of kv_state()."""
        get_size = self._lib.llama_state_seq_get_size
        return sum(int(get_size(self._pointer, seq)) for seq in self._held())

    def _held(self) -> range:
        """Give the sequences that have tokens: the first ones."""
        return range(sum(bool(self.tokens[seq]) for seq in range(self.n_seq)))

    def load_kv_state(self, state: KvState) -> None:
        """Replace the KV state by another context's.

        Raises BackendError, and is empty then, for another shape or other weights.
        """
        self.clear()
        for seq, weights in enumerate(state.weights):
            if weights != self._weights[seq]:
                raise BackendError(
                    f"A KV state cannot be reused: sequence {seq} was prefilled under other "
                    "weights than it has here."
                )
        try:
            for seq, data in enumerate(state.sequences):
                self._load(seq, data, state.tokens)
        except BackendError:
            self.clear()
            raise

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
