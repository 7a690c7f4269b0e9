"""Turn one module's values into what an adapter GGUF holds: scaled, in the base's order, encoded.

Values go from the source to the encoded tensor by slices of rows, so that of a large tensor no
more than the encoded one is in memory.
"""

import math
from collections.abc import Iterator
from typing import Any

import gguf
import numpy as np
from gguf.constants import GGMLQuantizationType
from numpy.typing import NDArray

from qaflora_edge import config
from qaflora_edge.arrays import F32
from qaflora_edge.convert.experts import PlannedExperts
from qaflora_edge.convert.plan import Planned, PlannedModule
from qaflora_edge.errors import UnsupportedAdapterError
from qaflora_edge.formats.safetensors import PIECE_VALUES

OUTTYPES = {name: GGMLQuantizationType[name.upper()] for name in config.OUTTYPES}
LARGEST_VALUE = {
    GGMLQuantizationType.F32: 3.4028234e38,
    GGMLQuantizationType.F16: 65504.0,
    GGMLQuantizationType.BF16: 3.3895313e38,
    GGMLQuantizationType.Q8_0: 127 * 65504.0,  # 8-bit numbers times a float16
}
_Q8_0_BLOCK = 32
_FLOATS = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}


def stored_shape(module: Planned, side: str) -> tuple[int, ...]:
    """Give the shape of lora_a or lora_b in the file, in numpy order."""
    if isinstance(module, PlannedExperts):
        n_expert, rank = module.n_expert, module.rank
        return (n_expert, rank, module.n_in) if side == "a" else (n_expert, module.n_out, rank)
    source = module.source
    if side == "b":
        return module.n_out, source.rank
    # llama.cpp 0c1e5709, llama-graph.cpp build_inp_embd takes rows of A by token.
    return (source.n_in, source.rank) if source.is_embedding else (source.rank, source.n_in)


def stored_type(n_row: int, wanted: GGMLQuantizationType) -> GGMLQuantizationType:
    """Fall back to F16 where rows do not divide into blocks, as upstream's converter does."""
    if wanted == GGMLQuantizationType.Q8_0 and n_row % _Q8_0_BLOCK:
        return GGMLQuantizationType.F16
    return wanted


def stored_bytes(module: Planned, side: str, wanted: GGMLQuantizationType) -> int:
    """Give the size of lora_a or lora_b in the file."""
    shape = stored_shape(module, side)
    return math.prod(gguf.quant_shape_to_byte_shape(shape, stored_type(shape[-1], wanted)))


def encoded_tensor(
    module: Planned, side: str, wanted: GGMLQuantizationType, buffer: NDArray[np.uint8]
) -> NDArray[Any]:
    """Read, turn and encode lora_a or lora_b of a module.

    buffer   [stored_bytes or more]  is used again for each tensor, so that memory stays whole
    returns  [n_row, n]  floats, or the bytes of their blocks, as the file holds them; in `buffer`.
             Of experts, the rows of all of them

    Raises UnsupportedAdapterError for values that the type cannot hold.
    """
    shape = stored_shape(module, side)
    kind = stored_type(shape[-1], wanted)
    raw = buffer[: stored_bytes(module, side, wanted)]
    encoded = raw.view(_FLOATS.get(kind, np.uint8)).reshape(math.prod(shape[:-1]), -1)
    with np.errstate(over="ignore", invalid="ignore"):  # what becomes infinite is found below
        if isinstance(module, PlannedExperts):
            largest = _encode_experts(module, side, kind, encoded)
        else:
            largest = _encode_matrix(module, side, kind, encoded)
    if largest > LARGEST_VALUE[kind]:
        raise UnsupportedAdapterError(
            f"Cannot convert module {module.name} of {module.path}: the largest value of "
            f"lora_{side.upper()} is {largest:g}, more than {kind.name} holds. "
            "Choose output type f32, or check the adapter's alpha."
        )
    return encoded


def _encode_matrix(
    module: PlannedModule, side: str, kind: GGMLQuantizationType, encoded: NDArray[Any]
) -> float:
    """Fill a matrix; give the largest magnitude of its values."""
    source = module.source
    tensor = source.a if side == "a" else source.b
    is_turned = source.is_transposed != (side == "a" and source.is_embedding)
    # The rows of a tensor that is turned lie in columns, and are whole only when all is read.
    pieces = _slices(tensor.read(transposed=True)) if is_turned else tensor.pieces()
    places = _places(module) if side == "b" else None
    largest = 0.0
    for begin, piece in pieces:
        if side == "b" and module.factor != 1.0:
            piece = piece * np.float32(module.factor)
        if side == "a" and module.columns is not None:
            piece = piece[:, module.columns]
        largest = max(largest, _largest(piece))
        if places is None:
            encoded[begin : begin + len(piece)] = _encode(piece, kind)
        else:
            place = places[begin : begin + len(piece)]
            encoded[place[place >= 0]] = _encode(piece[place >= 0], kind)
    return largest


def _encode_experts(
    module: PlannedExperts, side: str, kind: GGMLQuantizationType, encoded: NDArray[Any]
) -> float:
    """The same for experts, one after the other."""
    largest, n_done = 0.0, 0
    for values in module.values(side):
        largest = max(largest, _largest(values))
        encoded[n_done : n_done + len(values)] = _encode(values, kind)
        n_done += len(values)
    return largest


def _largest(values: F32) -> float:
    return max(float(values.max()), -float(values.min()))


def _places(module: PlannedModule) -> NDArray[np.int64] | None:
    """Give the row of the file for each row of the source's B; -1 for those of other tensors.

    returns  [n_out of the source], or None where all keep their order
    """
    if module.rows is None:
        return None
    places = np.full(module.source.n_out, -1)
    places[module.rows] = np.arange(len(module.rows))
    return places


def _slices(values: F32) -> Iterator[tuple[int, F32]]:
    """Cut values into slices of rows: the first row of each, and [some rows, n]."""
    n_row = max(1, PIECE_VALUES // values.shape[1])
    for begin in range(0, len(values), n_row):
        yield begin, values[begin : begin + n_row]


def _encode(values: F32, kind: GGMLQuantizationType) -> NDArray[Any]:
    """values  [n_row, n]  float32, of whole blocks"""
    if kind in _FLOATS:
        return values.astype(_FLOATS[kind], copy=False)
    # As one row: gguf steps over rows in Python, and blocks are the same either way.
    flat = np.ascontiguousarray(values).reshape(1, -1)
    encoded: NDArray[Any] = gguf.quants.quantize(flat, kind).reshape(len(values), -1)
    return encoded
