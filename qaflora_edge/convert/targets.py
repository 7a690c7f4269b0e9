"""Tensors of the base that take a delta, and the values that an adapter's file holds for them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qaflora_edge.arrays import F32
from qaflora_edge.convert.layouts import Index
from qaflora_edge.formats.adapter import module_kind
from qaflora_edge.peft.modules import PeftModule

SLICE_VALUES = 1 << 14  # that are turned and encoded at a time


@dataclass(frozen=True)
class Target:
    """A tensor of the base that takes a delta.

    source  the module, or the first of them, that the delta comes from
    """

    source: PeftModule
    base_name: str  # such as blk.0.attn_q.weight

    @property
    def kind(self) -> str:
        return module_kind(self.base_name)

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def path(self) -> Path:
        return self.source.a.path


@dataclass(frozen=True)
class PlannedModule(Target):
    """One tensor of the base, and the module whose delta it takes.

    factor   what B is multiplied by
    rows     [n_out]  the row of the source's B for each of the tensor's; None: all as they are
    columns  [n_in]   the column of the source's A for each of the tensor's; None: all as they are
    """

    factor: float
    rows: Index | None = None
    columns: Index | None = None

    @property
    def n_out(self) -> int:
        return self.source.n_out if self.rows is None else len(self.rows)

    @property
    def rank(self) -> int:
        return self.source.rank

    def shape(self, side: str) -> tuple[int, ...]:
        """Give the shape of lora_a or lora_b in the file, in numpy order."""
        if side == "b":
            return self.n_out, self.rank
        if self.source.is_embedding:
            # llama.cpp 0c1e5709, llama-graph.cpp build_inp_embd takes rows of A by token.
            return self.source.n_in, self.rank
        return self.rank, self.source.n_in

    def slices(self, side: str) -> Iterator[tuple[Any, F32]]:
        """Read lora_a or lora_b by slices of rows: their places in the file, and [some rows, n]."""
        values = self.source.read_a() if side == "a" else self.source.read_b()
        if side == "a" and self.source.is_embedding:
            values = values.T
        n_row = self.shape(side)[0]
        n_row_of_slice = max(1, SLICE_VALUES // values.shape[1])
        for begin in range(0, n_row, n_row_of_slice):
            place = slice(begin, begin + n_row_of_slice)
            if side == "b":
                rows = place if self.rows is None else self.rows[place]
                part = _scaled(values[rows], self.factor)
            else:
                part = values[place]
                if self.columns is not None:
                    part = part[:, self.columns]
            yield place, part


@dataclass(frozen=True)
class _Experts(Target):
    """A stacked tensor of the base: [n_expert, n_out, n_in]."""

    n_expert: int
    rank: int
    n_in: int
    n_out: int

    def shape(self, side: str) -> tuple[int, ...]:
        """Give the shape of lora_a or lora_b in the file, in numpy order."""
        if side == "a":
            return self.n_expert, self.rank, self.n_in
        return self.n_expert, self.n_out, self.rank


@dataclass(frozen=True)
class SingleExperts(_Experts):
    """The modules of single experts; those without one stay as they are.

    experts  expert -> its module, and what its B is multiplied by
    rank     the largest of theirs; the rest of smaller ones is zeros
    """

    experts: Mapping[int, tuple[PeftModule, float]]

    def slices(self, side: str) -> Iterator[tuple[Any, F32]]:
        """Read lora_a or lora_b expert by expert, as `PlannedModule.slices` does."""
        _, n_row, n_column = self.shape(side)
        for expert in range(self.n_expert):
            values = np.zeros((n_row, n_column), np.float32)
            if expert in self.experts:
                module, factor = self.experts[expert]
                if side == "a":
                    values[: module.rank] = module.read_a()
                else:
                    values[:, : module.rank] = _scaled(module.read_b(), factor)
            yield slice(expert * n_row, (expert + 1) * n_row), values


@dataclass(frozen=True)
class StackedExperts(_Experts):
    """The parameter of all experts that their deltas are taken from.

    rows        [n_out]  the parameter's row for each of an expert's; None: all as they are
    is_swapped  the file's A writes the output, and its B reads the input
    """

    factor: float
    rows: Index | None
    is_swapped: bool

    def slices(self, side: str) -> Iterator[tuple[Any, F32]]:
        """Read lora_a or lora_b expert by expert, as `PlannedModule.slices` does."""
        is_from_a = (side == "a") != self.is_swapped
        if is_from_a:
            stacked = self.source.read_a().reshape(self.n_expert, self.rank, -1)
        elif self.source.is_b_by_expert:
            stacked = self.source.read_b().reshape(self.n_expert, -1, self.rank)
        else:  # the experts lie side by side in each rank
            side_by_side = self.source.read_b().reshape(-1, self.rank, self.n_expert)
            stacked = np.moveaxis(side_by_side, 2, 0)
        n_row = self.shape(side)[1]
        for expert, values in enumerate(stacked):
            matrix = values.T if self.is_swapped else values
            if side == "b" and self.rows is not None:
                matrix = matrix[self.rows]
            if side == "b":
                matrix = _scaled(matrix, self.factor)
            yield slice(expert * n_row, (expert + 1) * n_row), matrix


@dataclass(frozen=True)
class MixedModule:
    """A tensor of the base, and A and B as the file holds them, of several adapters."""

    base_name: str
    name: str  # in messages
    path: Path
    a: F32
    b: F32

    def shape(self, side: str) -> tuple[int, ...]:
        """Give the shape of lora_a or lora_b in the file, in numpy order."""
        return self._values(side).shape

    def slices(self, side: str) -> Iterator[tuple[Any, F32]]:
        """Give lora_a or lora_b as one slice, as `PlannedModule.slices` does."""
        values = self._values(side)
        yield slice(None), values.reshape(-1, values.shape[-1])

    def _values(self, side: str) -> F32:
        return self.a if side == "a" else self.b


Planned = PlannedModule | SingleExperts | StackedExperts
Written = Planned | MixedModule


def _scaled(values: F32, factor: float) -> F32:
    if factor == 1.0:
        return values
    return values * np.float32(factor)
