"""What a tensor of the base takes from an adapter, and a stack of experts in particular.

No I/O but reading values.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qaflora_edge.arrays import F32
from qaflora_edge.convert.layouts import Index
from qaflora_edge.formats.base import module_kind
from qaflora_edge.peft.modules import PeftModule


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
class SingleExperts(Target):
    """A stacked tensor of the base, and the modules of its experts; those without one stay as is.

    experts  expert -> its module, and what its B is multiplied by
    rank     the largest of theirs; the rest of smaller ones is zeros
    """

    n_expert: int
    rank: int
    n_in: int
    n_out: int
    experts: Mapping[int, tuple[PeftModule, float]]

    @property
    def is_rescaled(self) -> bool:
        return any(factor != 1.0 for _, factor in self.experts.values())

    def values(self, side: str) -> Iterator[F32]:
        """Read A or B of each expert: [rank, n_in], or [n_out, rank] times its factor."""
        for expert in range(self.n_expert):
            shape = (self.rank, self.n_in) if side == "a" else (self.n_out, self.rank)
            values = np.zeros(shape, np.float32)
            if expert in self.experts:
                module, factor = self.experts[expert]
                if side == "a":
                    values[: module.rank] = module.read_a()
                else:
                    values[:, : module.rank] = module.read_b() * np.float32(factor)
            yield values


@dataclass(frozen=True)
class StackedExperts(Target):
    """A stacked tensor of the base, and the parameter that its experts' deltas are taken from.

    rows        [n_out]  the parameter's row for each of an expert's; None: all as they are
    is_swapped  the file's A writes the output, and its B reads the input
    """

    n_in: int
    n_out: int
    factor: float
    rows: Index | None
    is_swapped: bool

    @property
    def n_expert(self) -> int:
        return self.source.n_expert

    @property
    def rank(self) -> int:
        return self.source.rank

    @property
    def is_rescaled(self) -> bool:
        return self.factor != 1.0

    def values(self, side: str) -> Iterator[F32]:
        """Read A or B of each expert: [rank, n_in], or [n_out, rank] times its factor."""
        if (side == "a") != self.is_swapped:
            stacked = self.source.read_a().reshape(self.n_expert, self.rank, -1)
        elif self.source.is_b_by_expert:
            stacked = self.source.read_b().reshape(self.n_expert, -1, self.rank)
        else:  # the experts lie side by side in each rank
            stacked = np.moveaxis(self.source.read_b().reshape(-1, self.rank, self.n_expert), 2, 0)
        for values in stacked:
            own = values.T if self.is_swapped else values
            if side == "a":
                yield np.ascontiguousarray(own)
            else:
                own = own if self.rows is None else own[self.rows]
                yield np.ascontiguousarray(own) * np.float32(self.factor)


PlannedExperts = SingleExperts | StackedExperts


def common_alpha(modules: Sequence[PeftModule]) -> float:
    """Choose the alpha under which most modules need no change; a float32 value.

    A GGUF holds one alpha, and the runtime's scale is alpha / rank of the tensor.
    """
    counts = Counter(float(np.float32(module.scale * module.rank)) for module in modules)
    return max(counts, key=lambda alpha: (counts[alpha], alpha))


def scale_factor(scale: float, rank: int, alpha: float) -> float:
    """Give what B is multiplied by so that alpha / rank gives `scale`; exactly 1 if it does."""
    if float(np.float32(scale * rank)) == alpha:
        return 1.0
    return scale * rank / alpha
