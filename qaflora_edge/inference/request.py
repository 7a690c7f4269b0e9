"""A request: what one answer is made from, and what ends it early. It knows nothing of contexts."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from qaflora_edge.inference.sampling import Sampling

F32 = NDArray[np.float32]


class Cancellation:
    """Whether a call was told to end, by cancel() or by an event that the caller gave."""

    def __init__(self, event: threading.Event | None = None) -> None:
        self._is_set, self._event = False, event

    @property
    def is_set(self) -> bool:
        return self._is_set or (self._event is not None and self._event.is_set())

    def set(self) -> None:
        self._is_set = True


@dataclass(frozen=True, eq=False)
class Request:
    """A prompt, the weights that it is read and answered under, and how tokens are chosen.

    tokens        ids of the prompt
    weights       float32 [n_adapter, n_layer], of all loaded adapters
    adapters      names of those in use, for messages
    goes_on_from  number of the Sequence whose KV state stays as it was read, whatever its weights
                  were, as far as the prompt begins like what that one held; None: no other's
    keeps_logits  keep those after the prompt, and choose no token
    """

    tokens: tuple[int, ...]
    weights: F32
    sampling: Sampling = field(default_factory=Sampling)
    adapters: tuple[str, ...] = ()
    goes_on_from: int | None = None
    keeps_logits: bool = False
    cancellation: Cancellation = field(default_factory=Cancellation)

    @property
    def weights_key(self) -> bytes:
        """Equal where the weights are."""
        return self.weights.tobytes()
