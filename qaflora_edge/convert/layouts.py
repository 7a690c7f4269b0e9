"""How the rows and columns of a family's linear layers lie in a GGUF, and why others are refused.

No I/O.

llama.cpp's converter turns the weights of some families: rows of q and k into the order of ggml's
rope, fused projections apart. An adapter's B must be turned alike, and its A where columns are.
Here is what was read in llama.cpp 0c1e5709, conversion/*.py (every `modify_tensors`), and is
compared with it by the tests.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qaflora_edge.formats.base import ARCH_FACTS
from qaflora_edge.formats.base import REASONS as WHY
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


# From gguf's name of a module (blk.0.attn_q), the base and the module's n_out and n_in to the
# tensors that it goes to.
Layout = Callable[[str, GgufHeader, tuple[int, int]], tuple[Part, ...]]


class LayoutError(ValueError):
    """A module whose rows do not divide as the base's head counts ask."""


def rope_rows(n_out: int, n_head: int) -> Index:
    """Give HF's row for each of ggml's: pairs (i, i + half) of a head become neighbours.

    returns  [n_out]
    """
    if n_out % (2 * n_head):
        raise LayoutError(f"{n_out} rows, which {n_head} heads cannot share in pairs")
    return np.arange(n_out).reshape(n_head, 2, -1).swapaxes(1, 2).reshape(n_out)


def grouped_rows(n_out: int, n_head: int, n_head_kv: int) -> tuple[Index, Index, Index]:
    """Give the rows of q, k and v of a projection that holds them group by group.

    A group has the queries that share a key, then this key, then its value.
    """
    n_group, n_part = n_head_kv, n_head // n_head_kv + 2
    if n_head % n_head_kv or n_out % (n_group * n_part):
        raise LayoutError(f"{n_out} rows, which {n_head} heads and {n_head_kv} keys cannot share")
    rows = np.arange(n_out).reshape(n_group, n_part, -1)
    return rows[:, :-2].reshape(-1), rows[:, -2].reshape(-1), rows[:, -1].reshape(-1)


def neox_rows(n_out: int, n_head: int, n_rotary: int) -> Index:
    """Give HF's row for each of ggml's: neighbours of a head become pairs (i, i + half).

    n_rotary  rows of a head that are rotated, its first
    returns   [n_out]
    """
    if n_out % n_head or not 0 < n_rotary <= n_out // n_head or n_rotary % 2:
        raise LayoutError(
            f"{n_out} rows, which {n_head} heads with {n_rotary} rotated cannot share"
        )
    rows = np.arange(n_out).reshape(n_head, -1)
    turned = rows[:, :n_rotary]
    return np.concatenate([turned[:, ::2], turned[:, 1::2], rows[:, n_rotary:]], axis=1).reshape(-1)


def tiled_rows(n_row: int, n_key: int, n_value: int) -> Index:
    """Give HF's row for each of ggml's, of n_value heads in groups of those that share a key.

    HF has the heads group by group; ggml has the first of every group, then the second of each.
    """
    if n_value % n_key or n_row % n_value:
        raise LayoutError(f"{n_row} rows, which {n_value} values and {n_key} keys cannot share")
    return np.arange(n_row).reshape(n_key, n_value // n_key, -1).swapaxes(0, 1).reshape(-1)


def as_is(name: str, header: GgufHeader, shape: tuple[int, int]) -> tuple[Part, ...]:
    """Rows of every module keep their order."""
    return (Part(name),)


def rope_pairs(name: str, header: GgufHeader, shape: tuple[int, int]) -> tuple[Part, ...]:
    """Rows of q and k are in the order of ggml's rope."""
    stem = name.rpartition(".")[2]
    if stem in ("attn_q", "attn_k"):
        n_head = header.n_head if stem == "attn_q" else header.n_head_kv
        return (Part(name, rope_rows(shape[0], n_head)),)
    return (Part(name),)


def grouped_qkv(name: str, header: GgufHeader, shape: tuple[int, int]) -> tuple[Part, ...]:
    """The fused projection has all of q, then k, then v, where HF has them group by group."""
    if name.endswith(".attn_qkv"):
        parts = grouped_rows(shape[0], header.n_head, header.n_head_kv)
        return (Part(name, np.concatenate(parts)),)
    return (Part(name),)


def glm4_rows(name: str, header: GgufHeader, shape: tuple[int, int]) -> tuple[Part, ...]:
    """Rows of q and k are turned where the rope has sections, as of multimodal models."""
    if f"{header.architecture}.rope.dimension_sections" in header.metadata:
        stem = name.rpartition(".")[2]
        if stem in ("attn_q", "attn_k"):
            n_head = header.n_head if stem == "attn_q" else header.n_head_kv
            return (Part(name, neox_rows(shape[0], n_head, header.count("rope.dimension_count"))),)
    return (Part(name),)


def packed_rope_pairs(name: str, header: GgufHeader, shape: tuple[int, int]) -> tuple[Part, ...]:
    """HF's one projection has q, then k, then v; q and k are in the order of ggml's rope."""
    if not name.endswith(".attn_qkv"):
        return rope_pairs(name, header, shape)
    n_head, n_head_kv = header.n_head, header.n_head_kv
    if shape[0] % (n_head + 2 * n_head_kv):
        raise LayoutError(
            f"{shape[0]} rows, which {n_head} heads and {n_head_kv} keys cannot share"
        )
    n_dim = shape[0] // (n_head + 2 * n_head_kv)
    rows = np.split(np.arange(shape[0]), [n_head * n_dim, (n_head + n_head_kv) * n_dim])
    return _q_k_v(name, header, rows)


def grouped_rope_pairs(name: str, header: GgufHeader, shape: tuple[int, int]) -> tuple[Part, ...]:
    """HF's one projection has q, k and v group by group; rows as of `packed_rope_pairs`."""
    if not name.endswith(".attn_qkv"):
        return rope_pairs(name, header, shape)
    return _q_k_v(name, header, grouped_rows(shape[0], header.n_head, header.n_head_kv))


def _q_k_v(name: str, header: GgufHeader, rows: Sequence[Index]) -> tuple[Part, ...]:
    """rows  [n_out] of each  where HF has q, k and v"""
    block = name.removesuffix("attn_qkv")
    q, k, v = rows
    return (
        Part(f"{block}attn_q", q[rope_rows(len(q), header.n_head)]),
        Part(f"{block}attn_k", k[rope_rows(len(k), header.n_head_kv)]),
        Part(f"{block}attn_v", v),
    )


def granite_rows(name: str, header: GgufHeader, shape: tuple[int, int]) -> tuple[Part, ...]:
    """A shared MLP's first projection is cut into gate and up, named as a block without experts
    has them where it has none; rows of q and k are in the order of ggml's rope."""
    block, _, stem = name.rpartition(".")
    end = "_shexp" if f"{block}.ffn_gate_shexp.weight" in header.tensors else ""
    if stem == "ffn_gate_up":
        rows = _in_halves(shape[0])
        return (Part(f"{block}.ffn_gate{end}", rows[0]), Part(f"{block}.ffn_up{end}", rows[1]))
    if stem == "ffn_down_shexp":
        return (Part(f"{block}.ffn_down{end}"),)
    return rope_pairs(name, header, shape)


def qwen3next_rows(name: str, header: GgufHeader, shape: tuple[int, int]) -> tuple[Part, ...]:
    """Linear attention's first projection has a key's q, k, values and their gates together."""
    if not name.endswith(".ssm_in"):
        return (Part(name),)
    n_key, n_value = header.count("ssm.group_count"), header.count("ssm.time_step_rank")
    n_dim, n_inner = header.count("ssm.state_size"), header.count("ssm.inner_size")
    if shape[0] != 2 * (n_key * n_dim + n_inner) or n_inner % n_key:
        raise LayoutError(f"{shape[0]} rows, which {n_value} values and {n_key} keys cannot share")
    rows = np.arange(shape[0]).reshape(n_key, -1)
    q, k, v, z = np.split(rows, [n_dim, 2 * n_dim, 2 * n_dim + n_inner // n_key], axis=1)
    block = name.removesuffix("ssm_in")
    qkv = np.concatenate([q.reshape(-1), k.reshape(-1), v.reshape(-1)])
    return (Part(f"{block}attn_qkv", qkv), Part(f"{block}attn_gate", z.reshape(-1)))


def qwen35_rows(name: str, header: GgufHeader, shape: tuple[int, int]) -> tuple[Part, ...]:
    """Linear attention's values are tiled over the keys, where HF has them key by key."""
    stem = name.rpartition(".")[2]
    if stem not in ("attn_qkv", "attn_gate", "ssm_alpha", "ssm_beta", "ssm_out"):
        return (Part(name),)
    n_key, n_value = header.count("ssm.group_count"), header.count("ssm.time_step_rank")
    if stem == "ssm_out":
        return (Part(name, columns=tiled_rows(shape[1], n_key, n_value)),)
    n_before = 2 * n_key * header.count("ssm.state_size") if stem == "attn_qkv" else 0  # q and k
    values = n_before + tiled_rows(max(shape[0] - n_before, 0), n_key, n_value)
    return (Part(name, np.concatenate([np.arange(n_before), values])),)


def halves(**fused: tuple[str, str]) -> Layout:
    """Make a layout that cuts each of some fused stems into two tensors of one size."""

    def cut(name: str, header: GgufHeader, shape: tuple[int, int]) -> tuple[Part, ...]:
        block, _, stem = name.rpartition(".")
        if stem not in fused:
            return (Part(name),)
        rows = _in_halves(shape[0])
        return tuple(Part(f"{block}.{part}", rows[i]) for i, part in enumerate(fused[stem]))

    return cut


def _in_halves(n_row: int) -> Index:
    """returns  [2, n_row / 2]"""
    if n_row % 2:
        raise LayoutError(f"{n_row} rows, which two tensors cannot share")
    return np.arange(n_row).reshape(2, -1)


# The layouts that ARCH_FACTS names.
_BY_NAME: Mapping[str, Layout] = {
    layout.__name__: layout
    for layout in (
        as_is,
        rope_pairs,
        grouped_qkv,
        glm4_rows,
        packed_rope_pairs,
        grouped_rope_pairs,
        granite_rows,
        qwen3next_rows,
        qwen35_rows,
    )
}


def _layout(named: str | Mapping[str, tuple[str, str]]) -> Layout:
    return _BY_NAME[named] if isinstance(named, str) else halves(**named)


# general.architecture -> how its modules lie
ARCHITECTURES: Mapping[str, Layout] = {
    name: _layout(facts.layout) for name, facts in ARCH_FACTS.items() if facts.layout
}
# Those whose experts may be adapted: in HF and in a GGUF alike, each has gate, up and down.
MIXTURES = tuple(name for name, facts in ARCH_FACTS.items() if facts.experts)
# Why adapters are refused -> for which architectures
REASONS: Mapping[str, tuple[str, ...]] = {
    why: tuple(name for name, facts in ARCH_FACTS.items() if facts.refused == key)
    for key, why in WHY.items()
}
REFUSED: Mapping[str, str] = {name: why for why, names in REASONS.items() for name in names}
