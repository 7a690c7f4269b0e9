"""Both sides of a verification: the deltas of a module, as its source and as the file say them.

A delta is read by parts, so that of large matrices only tiles are in memory.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from qaflora_edge.arrays import F32, F64
from qaflora_edge.convert.experts import SingleExperts, StackedExperts
from qaflora_edge.convert.plan import Planned, PlannedModule
from qaflora_edge.convert.source_order import Index, expert_rows, source_columns, source_rows
from qaflora_edge.formats.adapter import AdapterInfo
from qaflora_edge.formats.gguf import GgufHeader, read_value_block
from qaflora_edge.formats.safetensors import StoredTensor
from qaflora_edge.peft.modules import PeftModule


@dataclass(frozen=True)
class Delta:
    """A matrix [n_out, n_in], which is left [n_out, rank] times right [rank, n_in].

    left   gives some neighbouring rows of the left, with the scale
    right  gives some neighbouring columns of the right
    """

    n_out: int
    n_in: int
    left: Callable[[range], F64]
    right: Callable[[range], F64]


def source_deltas(header: GgufHeader, module: Planned) -> Iterator[Delta]:
    """The deltas that the source says: one, or that of each expert; in the tensor's order."""
    if isinstance(module, PlannedModule):
        rows, columns = source_rows(header, module), source_columns(header, module)
        yield _of_module(module.source, rows, columns)
    elif isinstance(module, SingleExperts):
        for expert in range(module.n_expert):
            if expert in module.experts:
                source, _ = module.experts[expert]
                yield _of_module(source, np.arange(module.n_out), np.arange(module.n_in))
            else:
                yield Delta(module.n_out, module.n_in, lambda rows: np.zeros((len(rows), 1)),
                            lambda columns: np.zeros((1, len(columns))))  # fmt: skip
    else:
        for expert in range(module.n_expert):
            yield _of_parameter(header, module, expert)


def _of_module(source: PeftModule, rows: Index, columns: Index) -> Delta:
    ranks = range(source.rank)

    def left(part: range) -> F64:
        return source.scale * _gather(lambda own: _block(source, source.b, own, ranks), rows, part)

    def right(part: range) -> F64:
        return _gather(lambda own: _block(source, source.a, ranks, own).T, columns, part).T

    return Delta(len(rows), len(columns), left, right)


def _of_parameter(header: GgufHeader, module: StackedExperts, expert: int) -> Delta:
    """One expert of the parameter of all: by PEFT's rule, "o r e, e r i"; by MLX's, b[e] @ a[e]."""
    source = module.source
    ranks = range(expert * source.rank, (expert + 1) * source.rank)
    side_by_side = range(source.rank * source.n_expert)

    def of_a(part: range) -> F32:  # [len(part), rank]
        return source.a.read_block(ranks, part).T

    def of_b(part: range) -> F32:  # [len(part), rank]
        if source.is_b_by_expert:
            begin = expert * source.n_out
            rows = range(begin + part.start, begin + part.stop)
            return source.b.read_block(rows, range(source.rank))
        return source.b.read_block(part, side_by_side)[:, expert :: source.n_expert]

    writes, reads = (of_a, of_b) if module.is_swapped else (of_b, of_a)
    own = expert_rows(header, module, source.n_in if module.is_swapped else source.n_out)
    return Delta(
        len(own),
        module.n_in,
        lambda part: source.scale * _gather(writes, own, part),
        lambda part: reads(part).T.astype(np.float64),
    )


def _block(source: PeftModule, tensor: StoredTensor, rows: range, columns: range) -> F32:
    if source.is_transposed:
        return tensor.read_block(columns, rows).T
    return tensor.read_block(rows, columns)


def _gather(read: Callable[[range], F32], places: Index, part: range) -> F64:
    """Read the places of a part, which need not be neighbours.

    read     gives [n, rank] for neighbouring places
    returns  [len(part), rank]
    """
    own = places[part.start : part.stop]
    first = int(own.min())
    return read(range(first, int(own.max()) + 1))[own - first].astype(np.float64)


def stored_deltas(info: AdapterInfo, module: Planned) -> Iterator[Delta]:
    """The deltas that the file says, as a runtime reads it: one, or that of each expert."""
    a, b = (info.tensors[f"{module.base_name}.lora_{side}"] for side in "ab")
    n_rank = info.ranks[module.base_name]
    scale = info.alpha / n_rank
    is_embedding = isinstance(module, PlannedModule) and module.source.is_embedding
    n_expert = a.shape[0] if len(a.shape) == 3 else 1
    n_out, n_in = b.shape[-2], a.shape[0] if is_embedding else a.shape[-1]

    def of_expert(expert: int) -> Delta:
        def left(part: range) -> F64:
            rows = range(expert * n_out + part.start, expert * n_out + part.stop)
            values = read_value_block(info.path, b, rows, range(n_rank))
            return scale * values.astype(np.float64)

        def right(part: range) -> F64:
            ranks = range(expert * n_rank, (expert + 1) * n_rank)
            if is_embedding:
                return read_value_block(info.path, a, part, ranks).T.astype(np.float64)
            return read_value_block(info.path, a, ranks, part).astype(np.float64)

        return Delta(n_out, n_in, left, right)

    yield from map(of_expert, range(n_expert))
