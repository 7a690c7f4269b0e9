"""Verify a conversion: does the file that was written say what the PEFT adapter says?

A and B of each module are read from the source, and from the file as a runtime reads it, and
compared entry by entry; scales are compared in B. Of the code that converts only the order of rows
and columns is taken, which the tests compare with transformers and peft.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf.constants import GGMLQuantizationType

from qaflora_edge.arrays import F32, F64
from qaflora_edge.convert.layouts import Index
from qaflora_edge.convert.planned import Planned, PlannedModule, SingleExperts
from qaflora_edge.errors import ConversionError
from qaflora_edge.formats.adapter import AdapterInfo, read_adapter_gguf, read_pair
from qaflora_edge.progress import TellDone, silent

TILE = 256  # rows and columns that are compared at once: whole blocks of 8 bits
FLOAT32_ROUNDING = 2.0**-22  # of alpha, of the factor in B and of their product, with room
# The largest error of rounding a value, relative to it, and the smallest for tiny ones.
_ROUNDING = {
    GGMLQuantizationType.F32: (0.0, 0.0),
    GGMLQuantizationType.F16: (2.0**-11, 2.0**-25),
    GGMLQuantizationType.BF16: (2.0**-8, 2.0**-134),
    # Of a block's largest: half a step of 1/127, and a step that is itself rounded to float16.
    GGMLQuantizationType.Q8_0: (0.5 / 127 + 2.0**-11, 127 * 2.0**-25),
}


@dataclass(frozen=True)
class ModuleCheck:
    """How far one module of the file is from its source.

    largest_difference  of an entry of A or B
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


def verify_conversion(
    path: Path, modules: Sequence[Planned], progress: TellDone = silent
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
    kind_a = info.tensors[f"{module.base_name}.lora_a"].ggml_type
    kind_b = info.tensors[f"{module.base_name}.lora_b"].ggml_type
    # Blocks of 8 bits lie along the rows of the file: the ranks of an embedding's A and of B.
    is_embedding = isinstance(module, PlannedModule) and module.source.is_embedding
    axis_a = 0 if is_embedding else 1
    largest = np.zeros(2)
    sources = source_deltas(module)
    in_file = stored_deltas(info, module)
    for source, stored in zip(sources, in_file, strict=True):
        of_a = _compare(source.right, stored.right, 1.0, kind_a, axis_a)
        of_b = _compare(source.left, stored.left, source.scale / stored.scale, kind_b, 1)
        largest = np.maximum(largest, np.maximum(of_a, of_b))  # it keeps NaN
    difference, of_allowed = largest.tolist()
    return ModuleCheck(module.name, module.base_name, difference, of_allowed)


def _compare(
    source: F32, stored: F32, scale: float, stored_type: GGMLQuantizationType, axis: int
) -> F64:
    """Compare a side: the largest difference, and the largest share of what rounding explains.

    source   [n, m]       times `scale` to be stored as `stored_type`
    stored   [n.., m..]   what is beyond the source has to be 0: experts are filled up to one rank
    axis     along which blocks of 8 bits lie
    returns  [2]
    """
    largest = np.zeros(2)
    relative, smallest = _ROUNDING[stored_type]
    for tile in _tiles(stored):
        found = stored[tile]
        of_source = source[tile]
        n_row, n_column = of_source.shape
        expected = np.zeros_like(found)
        expected[:n_row, :n_column] = of_source * np.float32(scale)
        size = np.abs(expected)
        rounded = size
        if stored_type == GGMLQuantizationType.Q8_0:
            rounded = size.max(axis=axis, keepdims=True)
        allowed = rounded * relative + smallest + size * FLOAT32_ROUNDING
        with np.errstate(all="ignore"):  # a file that is wrong may hold anything
            difference = np.abs(found - expected)
            share = np.where(difference == 0, 0.0, difference / allowed)
        largest = np.maximum(largest, (difference.max(), share.max()))
    return largest


def _tiles(values: F32) -> Iterator[tuple[slice, slice]]:
    n_row, n_column = values.shape
    for row in range(0, n_row, TILE):
        for column in range(0, n_column, TILE):
            yield slice(row, row + TILE), slice(column, column + TILE)


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


def _all_or(rows: Index | None) -> Index | slice:
    if rows is None:
        return slice(None)
    return rows


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
