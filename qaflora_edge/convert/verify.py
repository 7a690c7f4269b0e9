"""Verify a conversion: does the file that was written say what the PEFT adapter says?

The delta `scale * B A` of each module is computed twice in float64, from the source and from the
file as a runtime reads it, and compared entry by entry. How rows were reordered is worked out once
more (`source_order`), and not taken from the code that reordered them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf.constants import GGMLQuantizationType
from numpy.typing import NDArray

from qaflora_edge.convert.experts import SingleExperts, StackedExperts
from qaflora_edge.convert.plan import Planned, PlannedModule
from qaflora_edge.convert.source_order import expert_rows, source_columns, source_rows
from qaflora_edge.errors import ConversionError
from qaflora_edge.formats.adapter_gguf import AdapterInfo, read_adapter_gguf, read_pair
from qaflora_edge.formats.gguf_header import GgufHeader

F64 = NDArray[np.float64]
Pair = tuple[F64, F64]  # B [n_out, rank] with its scale, and A [rank, n_in]

TILE_ROWS, TILE_COLUMNS = 256, 512  # of a delta that are in memory at a time
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
    path: Path,
    header: GgufHeader,
    modules: Sequence[Planned],
    progress: Callable[[int], None] | None = None,
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
    stored_a, stored_b, scale = read_pair(info, module.base_name)
    kinds = [info.tensors[f"{module.base_name}.lora_{side}"].ggml_type for side in "ab"]
    is_embedding = False
    pairs: Iterator[Pair]
    if isinstance(module, PlannedModule):
        is_embedding = module.source.is_embedding
        stored_a, stored_b = (stored_a.T if is_embedding else stored_a)[None], stored_b[None]
        pairs = iter([_plain_pair(header, module)])
    elif isinstance(module, SingleExperts):
        pairs = _single_pairs(module)
    else:
        pairs = _stacked_pairs(header, module)

    found = np.zeros(3)  # the largest difference, entry of the delta, and share of what is allowed
    for (left, right), (stored_left, stored_right) in zip(
        pairs, zip(stored_b, stored_a, strict=True), strict=True
    ):
        in_file = (scale * stored_left.astype(np.float64), stored_right.astype(np.float64))
        allowed = scale * _allowed(right, left / scale, kinds, is_embedding)
        found = np.maximum(found, _compare((left, right), in_file, allowed))  # it keeps NaN
    largest_difference, largest, of_allowed = found
    return ModuleCheck(
        module=module.name,
        tensor=module.base_name,
        largest_difference=float(largest_difference),
        relative_difference=float(largest_difference / largest) if largest else 0.0,
        of_allowed=float(of_allowed),
    )


def _plain_pair(header: GgufHeader, module: PlannedModule) -> Pair:
    source = module.source
    right = source.read_a()[:, source_columns(header, module)].astype(np.float64)
    left = source.read_b()[source_rows(header, module)].astype(np.float64)
    return source.scale * left, right


def _single_pairs(module: SingleExperts) -> Iterator[Pair]:
    """Give the pair of each expert from a module of its own; of one without, zeros."""
    for expert in range(module.n_expert):
        if expert not in module.experts:
            yield np.zeros((module.n_out, 1)), np.zeros((1, module.n_in))
            continue
        source, _ = module.experts[expert]
        left = source.read_b().astype(np.float64)
        yield source.scale * left, source.read_a().astype(np.float64)


def _stacked_pairs(header: GgufHeader, module: StackedExperts) -> Iterator[Pair]:
    """Give the pair of each expert from the parameter of all, by PEFT's rule: "o r e, e r i"."""
    source, rank = module.source, module.source.rank
    first, second = source.read_a().astype(np.float64), source.read_b().astype(np.float64)
    for expert in range(source.n_expert):
        rows = first[expert * rank : (expert + 1) * rank]  # [rank, n]
        columns = second[:, expert :: source.n_expert]  # [n, rank]
        left, right = (rows.T, columns.T) if module.is_swapped else (columns, rows)
        own = expert_rows(header, module, len(left))
        yield source.scale * left[own], right


def _compare(pair: Pair, in_file: Pair, allowed: F64) -> tuple[float, float, float]:
    """Compare two deltas: the largest difference, the largest entry, and the share of `allowed`.

    allowed  [n_out]  what an entry of a row may differ by
    """
    found = np.zeros(3)
    (left, right), (stored_left, stored_right) = pair, in_file
    for rows, columns in _tiles(len(left), right.shape[1]):
        delta = left[rows] @ right[:, columns]
        with np.errstate(all="ignore"):  # a file that is wrong may hold anything
            stored = stored_left[rows] @ stored_right[:, columns]
            difference = np.abs(stored - delta).max(axis=1)
            share = np.where(difference == 0, 0.0, difference / np.abs(allowed[rows]))
        found = np.maximum(found, (difference.max(), np.abs(delta).max(), share.max()))
    largest_difference, largest, of_allowed = found
    return float(largest_difference), float(largest), float(of_allowed)


def _tiles(n_row: int, n_column: int) -> Iterator[tuple[slice, slice]]:
    """Cut a matrix into tiles that lie in a core's cache, products and all."""
    for row in range(0, n_row, TILE_ROWS):
        for column in range(0, n_column, TILE_COLUMNS):
            yield slice(row, row + TILE_ROWS), slice(column, column + TILE_COLUMNS)


def _allowed(
    right: F64, left: F64, kinds: Sequence[GGMLQuantizationType], is_embedding: bool
) -> F64:
    """Bound the change of each row of `left @ right` by rounding both to the file's types.

    right    [rank, n_in]
    left     [n_out, rank]
    returns  [n_out]  the largest change of an entry of the row
    """
    # Blocks of 8 bits lie along the rows of the file: the ranks of an embedding's A and of B.
    error_right = _rounding(right, kinds[0], axis=0 if is_embedding else 1).max(axis=1)  # [rank]
    error_left = _rounding(left, kinds[1], axis=1)  # [n_out, rank]
    allowed: F64 = (np.abs(left) + error_left) @ error_right
    allowed += error_left @ np.abs(right).max(axis=1)
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
