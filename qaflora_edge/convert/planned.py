"""What a conversion writes: tensors of the base, each with the A and B of its delta."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qaflora_edge.arrays import F32
from qaflora_edge.convert.layouts import Index
from qaflora_edge.formats.adapter import target_of
from qaflora_edge.peft.modules import PeftModule


@dataclass(frozen=True)
class Target:
    """A tensor of the base that takes a delta.

    source  the module, or the first of them, that the delta comes from
    """

    source: PeftModule
    base_name: str  # such as blk.0.attn_q.weight

    @property
    def target(self) -> str:
        return target_of(self.base_name)

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

    def values(self, side: str) -> F32:
        """Read lora_a or lora_b as the file holds it: of its shape."""
        if side == "b":
            values = self.source.read_b()
            if self.rows is not None:
                values = values[self.rows]
            return _scaled(values, self.factor)
        values = self.source.read_a()
        if self.source.is_embedding:
            return values.T
        if self.columns is not None:
            values = values[:, self.columns]
        return values


@dataclass(frozen=True)
class _Experts(Target):
    """A stacked tensor of the base: [n_expert, n_out, n_in]."""

    n_expert: int
    rank: int
    n_in: int
    n_out: int

    def shape(self, side: str) -> tuple[int, ...]:
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

    def values(self, side: str) -> F32:
        values = np.zeros(self.shape(side), np.float32)
        for expert, (module, factor) in self.experts.items():
            if side == "a":
                values[expert, : module.rank] = module.read_a()
            else:
                values[expert, :, : module.rank] = _scaled(module.read_b(), factor)
        return values


@dataclass(frozen=True)
class StackedExperts(_Experts):
    """The parameter of all experts that their deltas are taken from.

    rows        [n_out]  the parameter's row for each of an expert's; None: all as they are
    is_swapped  the file's A writes the output, and its B reads the input
    """

    factor: float
    rows: Index | None
    is_swapped: bool

    def values(self, side: str) -> F32:
        is_from_a = (side == "a") != self.is_swapped
        if is_from_a:
            stacked = self.source.read_a().reshape(self.n_expert, self.rank, -1)
        elif self.source.is_b_by_expert:
            stacked = self.source.read_b().reshape(self.n_expert, -1, self.rank)
        else:  # the experts lie side by side in each rank
            side_by_side = self.source.read_b().reshape(-1, self.rank, self.n_expert)
            stacked = np.moveaxis(side_by_side, 2, 0)
        if self.is_swapped:
            stacked = stacked.swapaxes(1, 2)
        if side == "a":
            return stacked
        if self.rows is not None:
            stacked = stacked[:, self.rows]
        return _scaled(stacked, self.factor)


@dataclass(frozen=True)
class MixedModule:
    """A tensor of the base, and A and B as the file holds them, of several adapters."""

    base_name: str
    name: str  # in messages
    path: Path
    a: F32
    b: F32

    def shape(self, side: str) -> tuple[int, ...]:
        return self.values(side).shape

    def values(self, side: str) -> F32:
        return self.a if side == "a" else self.b


Planned = PlannedModule | SingleExperts | StackedExperts
Written = Planned | MixedModule


def _scaled(values: F32, factor: float) -> F32:
    if factor == 1.0:
        return values
    return values * np.float32(factor)
