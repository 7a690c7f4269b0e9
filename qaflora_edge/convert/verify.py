"""Verify a conversion: does the file that was written say what the PEFT adapter says?

The delta `scale * B A` of each module is computed twice in float64, from the source and from the
file as a runtime reads it, and compared entry by entry, a tile at a time. Of the code that converts
only the order of rows and columns is taken, which the tests compare with transformers and peft.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf.constants import GGMLQuantizationType

from qaflora_edge.arrays import F32, F64
from qaflora_edge.convert.layouts import Index
from qaflora_edge.convert.plan import Planned, PlannedModule, SingleExperts
from qaflora_edge.errors import ConversionError
from qaflora_edge.formats.adapter import AdapterInfo, read_adapter_gguf, read_pair
from qaflora_edge.progress import TellBytes, silent

# Of a delta that are in memory.
TILE_ROWS = 128
TILE_COLUMNS = 128  # whole blocks of 8 bits
FLOAT32_ROUNDING = 2.0**-22  # of alpha, of the factor in B and of their product, with room
# The largest error of rounding a value, relative to it, and the smallest for tiny ones.
_ROUNDING = {
    GGMLQuantizationType.F32: (0.0, 0.0),
    GGMLQuantizationType.F16: (2.0**-11, 2.0**-25),
    GGMLQuantizationType.BF16: (2.0**-8, 2.0**-134),
}
# Half a step of 1/127 of the block's largest, and a step that is itself rounded to float16.
_Q8_0_ROUNDING = (0.5 / 127 + 2.0**-11, 127 * 2.0**-25)


@dataclass(frozen=True)
class ModuleCheck:
    """How far one module of the file is from its source.

    largest_difference  of an entry of the delta
    of_allowed          the largest difference relative to what rounding explains; above 1 is wrong
    """

    module: str
    tensor: str
    largest_difference: float
    of_allowed: float

    @property
    def is_right(self) -> bool:
        return self.of_allowed <= 1.0  # False for NaN


@dataclass(frozen=True)
class Delta:
    """A matrix [n_out, n_in]: scale * left @ right.

    left   [n_out, rank]  float32
    right  [rank, n_in]   float32
    """

    left: F32
    right: F32
    scale: float

    def rows(self, part: slice) -> F64:
        """Give some rows of the left, with the scale."""
        return self.scale * self.left[part].astype(np.float64)

    def columns(self, part: slice) -> F64:
        return self.right[:, part].astype(np.float64)


def verify_conversion(
    path: Path, modules: Sequence[Planned], progress: TellBytes = silent
) -> tuple[ModuleCheck, ...]:
    """Compare the file of a conversion with its source, module by module.

    path      the adapter GGUF that was written
    progress  is told the modules done

    Raises ConversionError when a module is missing, added, or further from its source than the
    rounding to the file's types explains; its `checks` has all of them.
    """
    info = read_adapter_gguf(path)
    names = {module.base_name for module in modules}
    odd_names = sorted(info.ranks.keys() ^ names)
    if odd_names:
        odd = odd_names[0]
        state = "there"
        if odd in names:
            state = "missing"
        raise ConversionError(
            f"The conversion is wrong: tensor {odd} is {state} in the file; expected the "
            f"{len(names)} modules of the adapter. Nothing was kept; please report this.",
            (),
        )
    checks = []
    for index, module in enumerate(modules):
        checks.append(_check_module(info, module))
        progress(index + 1)
    wrong = [check for check in checks if not check.is_right]
    if wrong:
        shares = [check.of_allowed for check in wrong]
        no_nan = np.nan_to_num(shares, nan=np.inf)  # [n_wrong]
        worst = wrong[no_nan.argmax()]
        raise ConversionError(
            f"The conversion is wrong: {len(wrong)} of {len(checks)} modules differ from "
            f"{modules[0].path.parent}, most of all {worst.module} ({worst.tensor}), by "
            f"{worst.largest_difference:.3g}, {worst.of_allowed:.3g} times what rounding explains; "
            "expected at most once. Nothing was kept; please report this.",
            tuple(checks),
        )
    return tuple(checks)


def _check_module(info: AdapterInfo, module: Planned) -> ModuleCheck:
    scale = info.alpha / info.ranks[module.base_name]
    largest = np.zeros(2)  # the largest difference, and share of what is allowed
    sources = source_deltas(module)
    in_file = stored_deltas(info, module)
    for source, stored in zip(sources, in_file, strict=True):
        allowed = _allowed(source, info, module, scale)
        largest = np.maximum(largest, _compare(source, stored, allowed))  # it keeps NaN
    difference, of_allowed = largest.tolist()
    return ModuleCheck(module.name, module.base_name, difference, of_allowed)


def _compare(source: Delta, stored: Delta, allowed: F64) -> F64:
    """Compare two deltas: the largest difference, and its largest share of `allowed`.

    allowed  [n_out]  what an entry of a row may differ by
    returns  [2]
    """
    largest = np.zeros(2)
    n_row = len(source.left)
    n_column = source.right.shape[1]
    for columns in _tiles(n_column, TILE_COLUMNS):
        right = source.columns(columns)
        stored_right = stored.columns(columns)
        for rows in _tiles(n_row, TILE_ROWS):
            with np.errstate(all="ignore"):  # a file that is wrong may hold anything
                difference = stored.rows(rows) @ stored_right  # [tile rows, tile columns]
                difference -= source.rows(rows) @ right
                np.abs(difference, out=difference)
                by_row = difference.max(axis=1)
                ratio = by_row / allowed[rows]
                share = np.where(by_row == 0, 0.0, ratio)
            of_tile = (by_row.max(), share.max())
            largest = np.maximum(largest, of_tile)
    return largest


def _allowed(source: Delta, info: AdapterInfo, module: Planned, scale: float) -> F64:
    """Bound the change of each row of a delta by rounding its two sides to the file's types.

    scale    of the file, which its left is stored without
    returns  [n_out]  the largest change of an entry of the row
    """
    kind_a = info.tensors[f"{module.base_name}.lora_a"].ggml_type
    kind_b = info.tensors[f"{module.base_name}.lora_b"].ggml_type
    # Blocks of 8 bits lie along the rows of the file: the ranks of an embedding's A and of B.
    is_embedding = isinstance(module, PlannedModule) and module.source.is_embedding
    axis = 1
    if is_embedding:
        axis = 0
    n_row = len(source.left)
    rank, n_column = source.right.shape
    size_right = np.zeros(rank)  # the largest of each rank
    error_right = np.zeros(rank)
    for columns in _tiles(n_column, TILE_COLUMNS):
        right = source.columns(columns)
        errors = _rounding(right, kind_a, axis)
        size = np.abs(right).max(axis=1)
        size_right = np.maximum(size_right, size)
        error = errors.max(axis=1)
        error_right = np.maximum(error_right, error)
    allowed = np.empty(n_row)
    for rows in _tiles(n_row, TILE_ROWS):
        left = source.rows(rows) / scale
        error_left = _rounding(left, kind_b, axis=1)
        size_left = np.abs(left) + error_left
        by_right = size_left @ error_right
        by_left = error_left @ size_right
        allowed[rows] = abs(scale) * (by_right + by_left)
    return allowed


def _tiles(n: int, n_tile: int) -> Iterator[slice]:
    for begin in range(0, n, n_tile):
        yield slice(begin, begin + n_tile)


def _rounding(values: F64, kind: GGMLQuantizationType, axis: int) -> F64:
    """returns  [*values.shape]  the largest error of storing each value as `kind`"""
    size = np.abs(values)
    if kind == GGMLQuantizationType.Q8_0:
        relative, smallest = _Q8_0_ROUNDING
        largest = size.max(axis=axis, keepdims=True)
        rounded = np.broadcast_to(largest, size.shape) * relative
    else:
        relative, smallest = _ROUNDING[kind]
        rounded = size * relative
    return rounded + smallest + size * FLOAT32_ROUNDING


def source_deltas(module: Planned) -> Iterator[Delta]:
    """The deltas that the source says: one, or that of each expert; in the tensor's order."""
    source = module.source
    if isinstance(module, PlannedModule):
        rows = _all_or(module.rows)
        columns = _all_or(module.columns)
        left = source.read_b()[rows]
        right = source.read_a()[:, columns]
        yield Delta(left, right, source.scale)
    elif isinstance(module, SingleExperts):
        no_left = np.zeros((module.n_out, 1), np.float32)
        no_right = np.zeros((1, module.n_in), np.float32)
        for expert in range(module.n_expert):
            if expert in module.experts:
                single, _ = module.experts[expert]
                left = single.read_b()
                right = single.read_a()
                yield Delta(left, right, single.scale)
            else:
                yield Delta(no_left, no_right, 1.0)
    else:  # by PEFT's rule, "o r e, e r i"; by MLX's, b[e] @ a[e]
        n_expert = source.n_expert
        rows = _all_or(module.rows)
        stacked_a = source.read_a()
        by_expert_a = np.split(stacked_a, n_expert)
        stacked_b = source.read_b()
        if source.is_b_by_expert:
            by_expert_b = np.split(stacked_b, n_expert)
        else:
            by_expert_b = [stacked_b[:, expert::n_expert] for expert in range(n_expert)]
        for a, b in zip(by_expert_a, by_expert_b, strict=True):
            left = b
            right = a
            if module.is_swapped:
                left = a.T
                right = b.T
            yield Delta(left[rows], right, source.scale)


def _all_or(part: Index | None) -> Index | slice:
    if part is None:
        return slice(None)
    return part


def stored_deltas(info: AdapterInfo, module: Planned) -> Iterator[Delta]:
    """The deltas that the file says, as a runtime reads it: one, or that of each expert."""
    a, b, scale = read_pair(info, module.base_name)
    if isinstance(module, PlannedModule):
        right = a
        if module.source.is_embedding:
            right = a.T
        yield Delta(b, right, scale)
    else:
        for expert_a, expert_b in zip(a, b, strict=True):
            yield Delta(expert_b, expert_a, scale)
