"""Verify a conversion: does the file that was written say what the PEFT adapter says?

The delta `scale * B A` of each module is computed twice in float64, from the source and from the
file as a runtime reads it, and compared entry by entry. How rows were reordered is worked out once
more (`source_order`), and not taken from the code that reordered them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf.constants import GGMLQuantizationType

from qaflora_edge.arrays import F64
from qaflora_edge.convert.deltas import Delta, source_deltas, stored_deltas
from qaflora_edge.convert.plan import Planned, PlannedModule
from qaflora_edge.errors import ConversionError
from qaflora_edge.formats.adapter import AdapterInfo, read_adapter_gguf
from qaflora_edge.formats.gguf import GgufHeader, parts
from qaflora_edge.progress import TellBytes

TILE_ROWS, TILE_COLUMNS = 128, 128  # of a delta that are in memory; whole blocks of 8 bits
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

    largest_difference   of an entry of the delta
    relative_difference  the same, relative to the delta's largest entry
    of_allowed           the largest difference relative to what rounding explains; above 1 is wrong
    """

    module: str
    tensor: str
    largest_difference: float
    relative_difference: float
    of_allowed: float

    @property
    def is_right(self) -> bool:
        return self.of_allowed <= 1.0  # False for NaN


def verify_conversion(
    path: Path, header: GgufHeader, modules: Sequence[Planned], progress: TellBytes | None = None
) -> tuple[ModuleCheck, ...]:
    """Compare the file of a conversion with its source, module by module.

    path      the adapter GGUF that was written
    header    of the base
    progress  is told the modules done

    Raises ConversionError when a module is missing, added, or further from its source than the
    rounding to the file's types explains; its `checks` has all of them.
    """
    info = read_adapter_gguf(path)
    names = {module.base_name for module in modules}
    if info.ranks.keys() != names:
        odd = sorted(info.ranks.keys() ^ names)[0]
        found = "missing" if odd in names else "there"
        raise ConversionError(
            f"The conversion is wrong: tensor {odd} is {found} in the file; expected the "
            f"{len(names)} modules of the adapter. Nothing was kept; please report this.",
            (),
        )
    checks = []
    for index, module in enumerate(modules):
        checks.append(_check_module(info, header, module))
        if progress is not None:
            progress(index + 1)
    wrong = [check for check in checks if not check.is_right]
    if wrong:
        worst = max(wrong, key=lambda check: np.nan_to_num(check.of_allowed, nan=np.inf))
        raise ConversionError(
            f"The conversion is wrong: {len(wrong)} of {len(checks)} modules differ from "
            f"{modules[0].path.parent}, most of all {worst.module} ({worst.tensor}), by "
            f"{worst.largest_difference:.3g}, {worst.of_allowed:.3g} times what rounding explains; "
            "expected at most once. Nothing was kept; please report this.",
            tuple(checks),
        )
    return tuple(checks)


def _check_module(info: AdapterInfo, header: GgufHeader, module: Planned) -> ModuleCheck:
    kinds = [info.tensors[f"{module.base_name}.lora_{side}"].ggml_type for side in "ab"]
    scale = info.alpha / info.ranks[module.base_name]
    is_embedding = isinstance(module, PlannedModule) and module.source.is_embedding
    found = np.zeros(3)  # the largest difference, entry of the delta, and share of what is allowed
    pairs = zip(source_deltas(header, module), stored_deltas(info, module), strict=True)
    for source, stored in pairs:
        allowed = _allowed(source, kinds, scale, is_embedding)
        found = np.maximum(found, _compare(source, stored, allowed))  # it keeps NaN
    largest_difference, largest, of_allowed = found
    return ModuleCheck(
        module=module.name,
        tensor=module.base_name,
        largest_difference=float(largest_difference),
        relative_difference=float(largest_difference / largest) if largest else 0.0,
        of_allowed=float(of_allowed),
    )


def _compare(source: Delta, stored: Delta, allowed: F64) -> F64:
    """Compare two deltas: the largest difference, the largest entry, and the share of `allowed`.

    allowed  [n_out]  what an entry of a row may differ by
    returns  [3]
    """
    found = np.zeros(3)
    for columns in parts(source.n_in, TILE_COLUMNS):
        right, stored_right = source.right(columns), stored.right(columns)
        for rows in parts(source.n_out, TILE_ROWS):
            delta = source.left(rows) @ right
            with np.errstate(all="ignore"):  # a file that is wrong may hold anything
                difference = stored.left(rows) @ stored_right
                difference -= delta
                by_row = np.abs(difference, out=difference).max(axis=1)
                share = np.where(by_row == 0, 0.0, by_row / allowed[rows.start : rows.stop])
            largest = np.abs(delta, out=delta).max()
            found = np.maximum(found, (by_row.max(), largest, share.max()))
    return found


def _allowed(
    source: Delta, kinds: Sequence[GGMLQuantizationType], scale: float, is_embedding: bool
) -> F64:
    """Bound the change of each row of a delta by rounding its two sides to the file's types.

    scale    of the file, which its left is stored without
    returns  [n_out]  the largest change of an entry of the row
    """
    # Blocks of 8 bits lie along the rows of the file: the ranks of an embedding's A and of B.
    axis = 0 if is_embedding else 1
    size_right = error_right = np.zeros(1)  # [rank]  the largest of each rank
    for columns in parts(source.n_in, TILE_COLUMNS):
        right = source.right(columns)
        size_right = np.maximum(size_right, np.abs(right).max(axis=1))
        error_right = np.maximum(error_right, _rounding(right, kinds[0], axis).max(axis=1))
    allowed = np.empty(source.n_out)
    for rows in parts(source.n_out, TILE_ROWS):
        left = source.left(rows) / scale
        error_left = _rounding(left, kinds[1], axis=1)
        by_row = (np.abs(left) + error_left) @ error_right + error_left @ size_right
        allowed[rows.start : rows.stop] = abs(scale) * by_row
    return allowed


def _rounding(values: F64, kind: GGMLQuantizationType, axis: int) -> F64:
    """returns  [*values.shape]  the largest error of storing each value as `kind`"""
    size = np.abs(values)
    if kind == GGMLQuantizationType.Q8_0:
        relative, smallest = _Q8_0_ROUNDING
        rounded = np.broadcast_to(size.max(axis=axis, keepdims=True), size.shape) * relative
    else:
        relative, smallest = _ROUNDING[kind]
        rounded = size * relative
    return rounded + smallest + size * FLOAT32_ROUNDING
