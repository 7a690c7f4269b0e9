"""Keys and values of a sequence whose first tokens are another's: states of llama.cpp, as bytes.

llama_memory_seq_cp() copies all that a sequence holds or nothing where sequences have rooms of
their own, so that the two are put together outside.
"""

import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qaflora_edge.errors import BackendError

U8 = NDArray[np.uint8]


class MemoryKindError(BackendError):
    """A memory that is not, or not only, one key and value for each token and layer."""


# llama.cpp 0c1e5709: llama_context::state_seq_get_data, then llama_kv_cache::state_write once, or
# twice where some layers have a window (llama_kv_cache_iswa).
_N_OPENING = 8  # bytes: a magic number, the sequence
_CELL = np.dtype([("position", "<i4"), ("n_seq", "<u4"), ("seq", "<i4")])


@dataclass(frozen=True)
class _Cache:
    """One cache: where each token's position and numbers are.

    positions  int32 [n_cell]
    blocks     (offset, n_outer, n_byte) of arrays uint8 [n_outer, n_cell, n_byte]
    """

    positions: NDArray[np.int32]
    blocks: tuple[tuple[int, int, int], ...]


class _Reader:
    """Numbers one behind the other."""

    def __init__(self, data: memoryview, at: int) -> None:
        self._data, self.at = data, at

    def take(self, form: str) -> tuple[int, ...]:
        return struct.unpack_from(form, self._data, self.skip(struct.calcsize(form)))

    def skip(self, n: int) -> int:
        """Go on behind n bytes; gives where they begin."""
        start, self.at = self.at, self.at + n
        if self.at > self._data.nbytes:
            raise ValueError(f"{self.at} bytes of {self._data.nbytes}")
        return start


def with_beginning(state: U8, beginning: U8, n: int) -> U8:
    """What a sequence holds, with the keys and values that another read of the first n tokens.

    state, beginning  as llama_state_seq_get_data gives them, of the same model and options
    returns           the size of `state`; tokens that a window has left behind are in neither

    Raises MemoryKindError.
    """
    found = state.copy()
    whole, first = _caches(state), _caches(beginning)
    if len(whole) != len(first):
        raise _unknown(f"{len(whole)} and {len(first)} caches")
    for ours, theirs in zip(whole, first, strict=True):
        target = np.flatnonzero(ours.positions < n)
        order = np.argsort(theirs.positions)
        if not np.isin(ours.positions[target], theirs.positions).all():
            raise _unknown(f"not all of the first {n} tokens")
        source = order[np.searchsorted(theirs.positions, ours.positions[target], sorter=order)]
        for (to, n_outer, n_byte), (at, *shape) in zip(ours.blocks, theirs.blocks, strict=True):
            if shape != [n_outer, n_byte]:
                raise _unknown("layers of different sizes")
            _view(found, ours, (to, n_outer, n_byte))[:, target] = _view(
                beginning, theirs, (at, n_outer, n_byte)
            )[:, source]
    return found


def _view(state: U8, cache: _Cache, block: tuple[int, int, int]) -> U8:
    offset, n_outer, n_byte = block
    n_cell = cache.positions.size
    return state[offset : offset + n_outer * n_cell * n_byte].reshape(n_outer, n_cell, n_byte)


def _caches(state: U8) -> list[_Cache]:
    """The caches of a sequence's state that hold something, checked to its last byte."""
    reader = _Reader(state.data, _N_OPENING)
    caches = []
    try:
        while reader.at < state.size:
            (n_stream,) = reader.take("<I")
            for _ in range(n_stream):
                (n_cell,) = reader.take("<I")
                if n_cell:
                    caches.append(_cache(reader, state, n_cell))
    except (struct.error, ValueError) as error:
        raise _unknown(str(error)) from None
    return caches


def _cache(reader: _Reader, state: U8, n_cell: int) -> _Cache:
    cells = np.frombuffer(state, _CELL, n_cell, reader.skip(n_cell * _CELL.itemsize))
    if (cells["n_seq"] != 1).any():
        raise ValueError("cells of another kind")
    is_transposed, n_layer = reader.take("<II")
    blocks = []
    for _ in range(n_layer):
        _, n_byte = reader.take("<iQ")
        blocks.append((reader.skip(n_cell * n_byte), 1, n_byte))
    for _ in range(n_layer):
        if is_transposed:
            _, n_byte, n_outer = reader.take("<iII")
        else:
            (_, n_byte), n_outer = reader.take("<iQ"), 1
        blocks.append((reader.skip(n_outer * n_cell * n_byte), n_outer, n_byte))
    return _Cache(cells["position"], tuple(blocks))


def _unknown(found: str) -> MemoryKindError:
    return MemoryKindError(
        f"What this base holds of a prompt cannot be put together out of two: {found}, expected a "
        "key and a value for each token and layer; leave out the options fast and probe_tail."
    )
