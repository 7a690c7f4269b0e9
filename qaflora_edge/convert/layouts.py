"""How the rows and columns of a family's linear layers lie in a GGUF, and why others are refused.

No I/O.

llama.cpp's converter turns the weights of some families: rows of q and k into the order of ggml's
rope, fused projections apart. An adapter's B must be turned alike, and its A where columns are.
This was read in llama.cpp 0c1e5709, conversion/*.py (every `modify_tensors`); tests compare them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qaflora_edge.formats.base import ARCH_FACTS, REASONS
from qaflora_edge.formats.gguf import GgufHeader

Index = NDArray[np.int64]


@dataclass(frozen=True)
class Part:
    """What one tensor of the base takes of a module.

    tensor   its name, without .weight
    rows     [n_out]  the module's row for each of the tensor's; None: all as they are
    columns  [n_in]   the module's column for each of the tensor's; None: all as they are
    """

    tensor: str
    rows: Index | None = None
    columns: Index | None = None


@dataclass(frozen=True)
class Module:
    """A linear layer of a family: gguf's name of it (blk.0.attn_q), the base, and its size."""

    name: str
    header: GgufHeader
    n_out: int
    n_in: int

    @property
    def stem(self) -> str:
        """The name in its block: attn_q of blk.0.attn_q."""
        return self.name.rpartition(".")[2]

    def beside(self, stem: str) -> str:
        """Name another tensor of the same block."""
        return self.name.removesuffix(self.stem) + stem

    def unshared(self, among: str) -> "LayoutError":
        return LayoutError(f"{self.n_out} rows, which {among} cannot share")


Parts = tuple[Part, ...]
Layout = Callable[[Module], Parts]  # the tensors that a module goes to


class LayoutError(ValueError):
    """A module whose rows do not divide as the base's head counts ask."""


def rope_rows(n_out: int, n_head: int) -> Index:
    """Give HF's row for each of ggml's: pairs (i, i + half) of a head become neighbours.

    returns  [n_out]
    """
    if n_out % (2 * n_head):
        raise LayoutError(f"{n_out} rows, which {n_head} heads cannot share in pairs")
    rows = np.arange(n_out).reshape(n_head, 2, -1)  # [n_head, 2, half]
    pairs = rows.swapaxes(1, 2)  # [n_head, half, 2]
    return pairs.reshape(n_out)


def grouped_rows(module: Module) -> list[Index]:
    """Give the rows of q, k and v of a projection that holds them group by group.

    A group has the queries that share a key, then this key, then its value.
    """
    n_head = module.header.n_head
    n_group = module.header.n_head_kv
    n_query = n_head // n_group
    n_part = n_query + 2
    if n_head % n_group or module.n_out % (n_group * n_part):
        raise module.unshared(f"{n_head} heads and {n_group} keys")
    rows = np.arange(module.n_out).reshape(n_group, n_part, -1)  # [n_group, n_part, n_dim]
    q = rows[:, :-2]
    k = rows[:, -2]
    v = rows[:, -1]
    return [head_rows.reshape(-1) for head_rows in (q, k, v)]


def neox_rows(n_out: int, n_head: int, n_rotary: int) -> Index:
    """Give HF's row for each of ggml's: neighbours of a head become pairs (i, i + half).

    n_rotary  rows of a head that are rotated, its first
    returns   [n_out]
    """
    n_dim = n_out // n_head
    if n_out % n_head or not 0 < n_rotary <= n_dim or n_rotary % 2:
        raise LayoutError(
            f"{n_out} rows, which {n_head} heads with {n_rotary} rotated cannot share"
        )
    rows = np.arange(n_out).reshape(n_head, n_dim)
    first_of_pairs = rows[:, :n_rotary:2]
    second_of_pairs = rows[:, 1:n_rotary:2]
    others = rows[:, n_rotary:]
    turned = np.concatenate([first_of_pairs, second_of_pairs, others], axis=1)  # [n_head, n_dim]
    return turned.reshape(n_out)


def tiled_rows(n_row: int, n_key: int, n_value: int) -> Index:
    """Give HF's row for each of ggml's, of n_value heads in groups of those that share a key.

    HF has the heads group by group; ggml has the first of every group, then the second of each.
    """
    if n_value % n_key or n_row % n_value:
        raise LayoutError(f"{n_row} rows, which {n_value} values and {n_key} keys cannot share")
    n_in_group = n_value // n_key
    rows = np.arange(n_row).reshape(n_key, n_in_group, -1)  # [n_key, n_in_group, n_dim]
    tiled = rows.swapaxes(0, 1)  # [n_in_group, n_key, n_dim]
    return tiled.reshape(n_row)


def as_is(module: Module) -> Parts:
    """Rows of every module keep their order."""
    return (Part(module.name),)


def rope_pairs(module: Module) -> Parts:
    """Rows of q and k are in the order of ggml's rope."""
    if module.stem == "attn_q":
        rows = rope_rows(module.n_out, module.header.n_head)
    elif module.stem == "attn_k":
        rows = rope_rows(module.n_out, module.header.n_head_kv)
    else:
        return as_is(module)
    return (Part(module.name, rows),)


def grouped_qkv(module: Module) -> Parts:
    """The fused projection has all of q, then k, then v, where HF has them group by group."""
    if module.stem != "attn_qkv":
        return as_is(module)
    rows = np.concatenate(grouped_rows(module))
    return (Part(module.name, rows),)


def glm4_rows(module: Module) -> Parts:
    """Rows of q and k are turned where the rope has sections, as of multimodal models."""
    header = module.header
    sections = f"{header.architecture}.rope.dimension_sections"
    has_sections = sections in header.metadata
    if not has_sections or module.stem not in ("attn_q", "attn_k"):
        return as_is(module)
    n_head = header.n_head
    if module.stem == "attn_k":
        n_head = header.n_head_kv
    n_rotary = header.count("rope.dimension_count")
    rows = neox_rows(module.n_out, n_head, n_rotary)
    return (Part(module.name, rows),)


def packed_rope_pairs(module: Module) -> Parts:
    """HF's one projection has q, then k, then v; q and k are in the order of ggml's rope."""
    if module.stem != "attn_qkv":
        return rope_pairs(module)
    n_head = module.header.n_head
    n_head_kv = module.header.n_head_kv
    n_part = n_head + 2 * n_head_kv  # heads of q, k and v
    if module.n_out % n_part:
        raise module.unshared(f"{n_head} heads and {n_head_kv} keys")
    n_dim = module.n_out // n_part
    k_begin = n_head * n_dim
    v_begin = k_begin + n_head_kv * n_dim
    fused = np.arange(module.n_out)
    rows = np.split(fused, [k_begin, v_begin])
    return _q_k_v(module, rows)


def grouped_rope_pairs(module: Module) -> Parts:
    """HF's one projection has q, k and v group by group; rows as of `packed_rope_pairs`."""
    if module.stem != "attn_qkv":
        return rope_pairs(module)
    rows = grouped_rows(module)
    return _q_k_v(module, rows)


def _q_k_v(module: Module, rows: Sequence[Index]) -> Parts:
    """rows  [n_out] of each  where HF has q, k and v"""
    header = module.header
    q, k, v = rows
    q_turned = q[rope_rows(len(q), header.n_head)]
    k_turned = k[rope_rows(len(k), header.n_head_kv)]
    return (
        Part(module.beside("attn_q"), q_turned),
        Part(module.beside("attn_k"), k_turned),
        Part(module.beside("attn_v"), v),
    )


def granite_rows(module: Module) -> Parts:
    """A shared MLP's first projection is cut into gate and up, named as a block without experts
    has them where it has none; rows of q and k are in the order of ggml's rope."""
    gate = module.beside("ffn_gate_shexp.weight")
    end = ""
    if gate in module.header.tensors:
        end = "_shexp"
    if module.stem == "ffn_gate_up":
        return _in_halves(module, (f"ffn_gate{end}", f"ffn_up{end}"))
    if module.stem == "ffn_down_shexp":
        down = module.beside(f"ffn_down{end}")
        return (Part(down),)
    return rope_pairs(module)


def qwen3next_rows(module: Module) -> Parts:
    """Linear attention's first projection has a key's q, k, values and their gates together."""
    if module.stem != "ssm_in":
        return as_is(module)
    header = module.header
    n_key = header.count("ssm.group_count")
    n_value = header.count("ssm.time_step_rank")
    n_dim = header.count("ssm.state_size")
    n_inner = header.count("ssm.inner_size")
    n_keys_dim = n_key * n_dim  # of q, and of k
    n_expected = 2 * (n_keys_dim + n_inner)
    if module.n_out != n_expected or n_inner % n_key:
        raise module.unshared(f"{n_value} values and {n_key} keys")
    rows = np.arange(module.n_out).reshape(n_key, -1)
    k_end = 2 * n_dim
    v_end = k_end + n_inner // n_key
    q, k, v, z = np.split(rows, [n_dim, k_end, v_end], axis=1)
    flat = [head_rows.reshape(-1) for head_rows in (q, k, v)]
    qkv = np.concatenate(flat)
    return (
        Part(module.beside("attn_qkv"), qkv),
        Part(module.beside("attn_gate"), z.reshape(-1)),
    )


def qwen35_rows(module: Module) -> Parts:
    """Linear attention's values are tiled over the keys, where HF has them key by key."""
    if module.stem not in ("attn_qkv", "attn_gate", "ssm_alpha", "ssm_beta", "ssm_out"):
        return as_is(module)
    header = module.header
    n_key = header.count("ssm.group_count")
    n_value = header.count("ssm.time_step_rank")
    if module.stem == "ssm_out":
        columns = tiled_rows(module.n_in, n_key, n_value)
        return (Part(module.name, columns=columns),)
    n_before = 0
    if module.stem == "attn_qkv":  # q and k come first
        n_dim = header.count("ssm.state_size")
        n_before = 2 * n_key * n_dim
    n_tiled = max(module.n_out - n_before, 0)
    values = n_before + tiled_rows(n_tiled, n_key, n_value)
    before = np.arange(n_before)
    rows = np.concatenate([before, values])
    return (Part(module.name, rows),)


def halves(**fused: tuple[str, str]) -> Layout:
    """Make a layout that cuts each of some fused stems into two tensors of one size."""

    def cut(module: Module) -> Parts:
        if module.stem not in fused:
            return as_is(module)
        return _in_halves(module, fused[module.stem])

    return cut


def _in_halves(module: Module, stems: tuple[str, str]) -> Parts:
    if module.n_out % 2:
        raise module.unshared("two tensors")
    first, second = np.arange(module.n_out).reshape(2, -1)
    upper = module.beside(stems[0])
    lower = module.beside(stems[1])
    return (Part(upper, first), Part(lower, second))


# The layouts that ARCH_FACTS names.
_LAYOUTS: tuple[Layout, ...] = (as_is, rope_pairs, grouped_qkv, glm4_rows, packed_rope_pairs)
_LAYOUTS += (grouped_rope_pairs, granite_rows, qwen3next_rows, qwen35_rows)
_BY_NAME: Mapping[str, Layout] = {layout.__name__: layout for layout in _LAYOUTS}
# general.architecture -> how its modules lie
ARCHITECTURES: dict[str, Layout] = {}
# Architecture -> why its adapters are refused
REFUSED: dict[str, str] = {}
for _name, _facts in ARCH_FACTS.items():
    if _facts.refused:
        REFUSED[_name] = REASONS[_facts.refused]
    elif isinstance(_facts.layout, str):
        ARCHITECTURES[_name] = _BY_NAME[_facts.layout]
    else:
        ARCHITECTURES[_name] = halves(**_facts.layout)
# Those whose experts may be adapted: in HF and in a GGUF alike, each has gate, up and down.
MIXTURES = tuple(name for name, facts in ARCH_FACTS.items() if facts.experts)
