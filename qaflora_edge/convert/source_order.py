"""Where each row and column of a tensor lies in its module, by plain arithmetic. No I/O.

What llama.cpp 0c1e5709, conversion/*.py, does to rows, told a second time and in other terms than
`layouts` does: verifying a conversion takes nothing from the code that converts.
"""

import numpy as np
from numpy.typing import NDArray

from qaflora_edge.convert.experts import StackedExperts
from qaflora_edge.convert.plan import PlannedModule
from qaflora_edge.formats.gguf import GgufHeader

Index = NDArray[np.int64]

_PAIRED_ROPE = (
    *("llama", "arcee", "bailingmoe", "deepseek", "granite", "granitehybrid", "granitemoe"),
    *("internlm2", "minicpm", "mistral3", "olmo", "smollm3", "xverse"),
)
_HALVED_ROPE = ("glm4",)
_GROUPED_QKV = ("bloom", "falcon", "gptneox")
_PACKED = {"bailingmoe": "query_key_value"}
# The stem that has the second of a module's two halves.
_SECOND = {
    **{"proj_1": ("ffn_up",), "kv": ("attn_v",), "gate_up_proj": ("ffn_up",)},
    "input_linear": ("ffn_up", "ffn_up_shexp"),
}
_GROUPED = {"internlm2": "wqkv"}
_GATE_UP_BY_TURNS = ("gpt-oss",)
_TILED = ("qwen35", "qwen35moe")


def source_rows(header: GgufHeader, module: PlannedModule) -> Index:
    """returns  [n_out]  the module's row for each row of the tensor"""
    architecture, stem, n_out = header.architecture, module.kind, module.n_out
    name = module.source.name.rpartition(".")[2]
    row = np.arange(n_out)
    if stem == "attn_qkv" and architecture in _GROUPED_QKV:
        return _grouped_row(row, n_out, header.n_head, header.n_head_kv)
    if name == "in_proj_qkvz":
        return _gated_row(row, header, is_gate=stem == "attn_gate")
    if architecture in _TILED and stem in ("attn_qkv", "attn_gate", "ssm_alpha", "ssm_beta"):
        n_before = 2 * header.n_ssm("group_count") * header.n_ssm("state_size")
        n_before = n_before if stem == "attn_qkv" else 0
        tiled = n_before + _tiled_place(row - n_before, n_out - n_before, header)
        return np.where(row < n_before, row, tiled)
    if stem in ("attn_q", "attn_k"):
        row = _turned(row, header, header.n_head if stem == "attn_q" else header.n_head_kv)
    if module.source.n_out == 2 * n_out and stem in _SECOND.get(name, ()):
        row = n_out + row
    if name in (_PACKED.get(architecture), _GROUPED.get(architecture)):
        n_dim = module.source.n_out // (header.n_head + 2 * header.n_head_kv)
        n_before = {"attn_q": 0, "attn_k": header.n_head}.get(
            stem, header.n_head + header.n_head_kv
        )
        row = n_before * n_dim + row
        if name == _GROUPED.get(architecture):
            return _grouped_row(row, module.source.n_out, header.n_head, header.n_head_kv)
    return row


def source_columns(header: GgufHeader, module: PlannedModule) -> Index:
    """returns  [n_in]  the module's column for each column of the tensor"""
    column = np.arange(module.source.n_in)
    if header.architecture in _TILED and module.kind == "ssm_out":
        return _tiled_place(column, len(column), header)
    return column


def expert_rows(header: GgufHeader, module: StackedExperts, n_row: int) -> Index:
    """Give the parameter's row, of n_row, for each row of an expert's tensor.

    returns  [n_out]
    """
    row, half = np.arange(module.n_out), n_row // 2
    is_by_turns = header.architecture in _GATE_UP_BY_TURNS
    if not module.name.endswith(".gate_up_proj"):
        return row
    if module.kind == "ffn_gate_up_exps" and is_by_turns:
        return row % half * 2 + row // half
    if module.kind == "ffn_gate_exps":
        return 2 * row if is_by_turns else row
    if module.kind == "ffn_up_exps":
        return 2 * row + 1 if is_by_turns else row + half
    return row


def _turned(row: Index, header: GgufHeader, n_head: int) -> Index:
    """Rows of q or k, of all heads, in the order that HF's rope has them in."""
    n_dim = len(row) // n_head
    head, dim = row - row % n_dim, row % n_dim
    if header.architecture in _PAIRED_ROPE:  # 0, half, 1, half + 1, ...
        return head + dim // 2 + dim % 2 * (n_dim // 2)
    if header.architecture in _HALVED_ROPE and (
        f"{header.architecture}.rope.dimension_sections" in header.metadata
    ):  # 0, 2, 4, ..., 1, 3, 5, ... of the dimensions that are rotated
        half = header.n_rotary // 2
        turned = np.where(dim < half, 2 * dim, 2 * (dim - half) + 1)
        return head + np.where(dim < header.n_rotary, turned, dim)
    return row


def _grouped_row(row: Index, n_row: int, n_head: int, n_head_kv: int) -> Index:
    """Of all q, then all k, then all v, where the source has them by groups: q ... q k v."""
    n_shared = n_head // n_head_kv
    n_dim = n_row // (n_head + 2 * n_head_kv)
    head, dim = row // n_dim, row % n_dim
    in_key, in_value = head - n_head, head - n_head - n_head_kv
    group = np.select([head < n_head, in_value < 0], [head // n_shared, in_key], in_value)
    place = np.select([head < n_head, in_value < 0], [head % n_shared, n_shared], n_shared + 1)
    rows: Index = (group * (n_shared + 2) + place) * n_dim + dim
    return rows


def _gated_row(row: Index, header: GgufHeader, *, is_gate: bool) -> Index:
    """Of all q, k and v, or of all gates, where the source has those of a key together."""
    n_key, n_dim = header.n_ssm("group_count"), header.n_ssm("state_size")
    n_value = header.n_ssm("inner_size") // n_key  # rows of the values of one key
    n_group = 2 * (n_dim + n_value)
    if is_gate:
        return row // n_value * n_group + 2 * n_dim + n_value + row % n_value
    part, row_v = row // (n_key * n_dim), row - 2 * n_key * n_dim  # 0: q, 1: k
    in_key = row % (n_key * n_dim)
    key = in_key // n_dim * n_group + part * n_dim + in_key % n_dim
    value = row_v // n_value * n_group + 2 * n_dim + row_v % n_value
    return np.where(part < 2, key, value)


def _tiled_place(place: Index, n_place: int, header: GgufHeader) -> Index:
    """Of the first value of every key, then the second, where the source has a key's together."""
    n_key, n_value = header.n_ssm("group_count"), header.n_ssm("time_step_rank")
    n_dim = n_place // n_value
    head, dim = place // n_dim, place % n_dim
    return (head % n_key * (n_value // n_key) + head // n_key) * n_dim + dim
