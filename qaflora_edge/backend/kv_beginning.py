"""Keys and values of a sequence whose first tokens are another's: states of llama.cpp, as bytes.

llama_memory_seq_cp() copies all that a sequence holds or nothing where sequences have rooms of
their own, so that the two are put together outside.
"""

import mmap
import struct
import sys
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
_N_HEAD = 12  # bytes: a layer's type, and how large its rows or elements are
_N_BYTE = {0: 4, 1: 2}  # of an element, by ggml_type: F32, F16
_CELL = np.dtype([("position", "<i4"), ("n_seq", "<u4"), ("seq", "<i4")])


@dataclass(frozen=True)
class _Cache:
    """One cache: where each token's position and numbers are.

    span       where all of it is
    positions  int32 [n_cell]
    flag_at    offset of the number that says whether values are kept by element
    blocks     (offset, n_outer, n_byte) of arrays uint8 [n_outer, n_cell, n_byte]: each layer's
               keys, then each layer's values
    """

    span: slice
    positions: NDArray[np.int32]
    flag_at: int
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


def mapped(n_byte: int) -> U8:
    """Memory that goes back to the system when it is dropped; malloc would keep it."""
    if sys.platform == "win32":
        return np.frombuffer(mmap.mmap(-1, n_byte), np.uint8)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    return np.frombuffer(mmap.mmap(-1, n_byte, flags), np.uint8)


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


def for_rooms(state: U8, n_room: int, *, by_element: bool) -> U8:
    """What a sequence of a context with one room holds, for a context with several.

    state       uint8 [n_byte], as llama_state_seq_get_data gives it
    n_room      how many rooms that context has, one for each of its sequences
    by_element  without flash attention values are kept by element, not by token
    returns     uint8, four bytes more for each room more

    Raises MemoryKindError.
    """
    parts = [state[:_N_OPENING]]
    for caches in _memories(state):
        parts.append(np.frombuffer(struct.pack("<I", n_room), np.uint8))
        parts += [
            _by_element(state, cache) if by_element else state[cache.span] for cache in caches
        ]
        parts.append(np.zeros(4 * (n_room - len(caches)), np.uint8))  # nothing in the others
    return np.concatenate(parts)


def _by_element(state: U8, cache: _Cache) -> U8:
    start, n_cell = cache.span.start, cache.positions.size
    (is_by_element,) = struct.unpack_from("<I", state.data, cache.flag_at)
    if is_by_element:
        return state[cache.span]
    found = state[cache.span].copy()
    struct.pack_into("<I", found.data, cache.flag_at - start, 1)
    for offset, _, n_byte in cache.blocks[len(cache.blocks) // 2 :]:
        (kind,) = struct.unpack_from("<i", state.data, offset - _N_HEAD)
        if kind not in _N_BYTE:
            raise _unknown(f"values of type {kind}")
        size = _N_BYTE[kind]
        struct.pack_into("<II", found.data, offset - start - _N_HEAD + 4, size, n_byte // size)
        rows = state[offset : offset + n_cell * n_byte].view(f"V{size}").reshape(n_cell, -1)
        turned = np.ascontiguousarray(rows.T).view(np.uint8).ravel()
        found[offset - start : offset - start + turned.size] = turned
    return found


def _view(state: U8, cache: _Cache, block: tuple[int, int, int]) -> U8:
    offset, n_outer, n_byte = block
    n_cell = cache.positions.size
    return state[offset : offset + n_outer * n_cell * n_byte].reshape(n_outer, n_cell, n_byte)


def _caches(state: U8) -> list[_Cache]:
    return [cache for caches in _memories(state) for cache in caches]


def _memories(state: U8) -> list[list[_Cache]]:
    """The rooms of a sequence's state that hold something, checked to its last byte.

    returns  those of each memory: some models have two
    """
    reader = _Reader(state.data, _N_OPENING)
    memories = []
    try:
        while reader.at < state.size:
            (n_room,) = reader.take("<I")
            found = (_cache(reader, state) for _ in range(n_room))
            memories.append([cache for cache in found if cache.positions.size])
    except (struct.error, ValueError) as error:
        raise _unknown(str(error)) from None
    return memories


def _cache(reader: _Reader, state: U8) -> _Cache:
    start = reader.at
    (n_cell,) = reader.take("<I")
    if not n_cell:
        return _Cache(slice(start, reader.at), np.zeros(0, np.int32), 0, ())
    cells = np.frombuffer(state, _CELL, n_cell, reader.skip(n_cell * _CELL.itemsize))
    if (cells["n_seq"] != 1).any():
        raise ValueError("cells of another kind")
    flag_at = reader.at
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
    return _Cache(slice(start, reader.at), cells["position"], flag_at, tuple(blocks))


def _unknown(found: str) -> MemoryKindError:
    return MemoryKindError(
        f"What this base holds of a prompt cannot be put together out of two: {found}, expected a "
        "key and a value for each token and layer; leave out the options fast and probe_tail."
    )
