"""How each reviewed architecture's linear layers lie in its GGUF. No I/O.

llama.cpp's converter turns the weights of some families: rows of q and k into the order of ggml's
rope, fused projections apart. An adapter's B must be turned alike. Here is what was read in
llama.cpp 0c1e5709, conversion/*.py (every `modify_tensors`), and is compared with it by the tests.
An architecture that is not in ARCHITECTURES was not reviewed, and is refused.
"""

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from qaflora_edge.formats.gguf_header import GgufHeader

Rows = NDArray[np.int64]


# From the GGUF's stem of a module (attn_q), the base and the module's n_out to the module's row for
# each of the tensor's; None: all rows as they are.
Layout = Callable[[str, GgufHeader, int], Rows | None]


class LayoutError(ValueError):
    """A module whose rows do not divide as the base's head counts ask."""


def rope_rows(n_out: int, n_head: int) -> Rows:
    """Give HF's row for each of ggml's: pairs (i, i + half) of a head become neighbours.

    returns  [n_out]
    """
    if n_out % (2 * n_head):
        raise LayoutError(f"{n_out} rows, which {n_head} heads cannot share in pairs")
    return np.arange(n_out).reshape(n_head, 2, -1).swapaxes(1, 2).reshape(n_out)


def grouped_rows(n_out: int, n_head: int, n_head_kv: int) -> tuple[Rows, Rows, Rows]:
    """Give the rows of q, k and v of a projection that holds them group by group.

    A group has the queries that share a key, then this key, then its value.
    """
    n_group, n_part = n_head_kv, n_head // n_head_kv + 2
    if n_head % n_head_kv or n_out % (n_group * n_part):
        raise LayoutError(f"{n_out} rows, which {n_head} heads and {n_head_kv} keys cannot share")
    rows = np.arange(n_out).reshape(n_group, n_part, -1)
    return rows[:, :-2].reshape(-1), rows[:, -2].reshape(-1), rows[:, -1].reshape(-1)


def as_is(stem: str, header: GgufHeader, n_out: int) -> Rows | None:
    """Rows of every module keep their order."""
    return None


def rope_pairs(stem: str, header: GgufHeader, n_out: int) -> Rows | None:
    """Rows of q and k are in the order of ggml's rope."""
    if stem == "attn_q":
        return rope_rows(n_out, header.n_head)
    if stem == "attn_k":
        return rope_rows(n_out, header.n_head_kv)
    return None


def grouped_qkv(stem: str, header: GgufHeader, n_out: int) -> Rows | None:
    """The fused projection has all of q, then k, then v, where HF has them group by group."""
    if stem == "attn_qkv":
        return np.concatenate(grouped_rows(n_out, header.n_head, header.n_head_kv))
    return None


def neox_rows(n_out: int, n_head: int, n_rotary: int) -> Rows:
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


def glm4_rows(stem: str, header: GgufHeader, n_out: int) -> Rows | None:
    """Rows of q and k are turned where the rope has sections, as of multimodal models."""
    if f"{header.architecture}.rope.dimension_sections" in header.metadata:
        if stem == "attn_q":
            return neox_rows(n_out, header.n_head, header.n_rotary)
        if stem == "attn_k":
            return neox_rows(n_out, header.n_head_kv, header.n_rotary)
    return None


# general.architecture -> how its modules lie. Each was read, and is proven by the tests.
ARCHITECTURES: Mapping[str, Layout] = {
    "apertus": as_is,
    "arcee": rope_pairs,
    "bloom": grouped_qkv,
    "chatglm": as_is,
    "cohere2": as_is,
    "command-r": as_is,
    "dots1": as_is,
    "ernie4_5": as_is,
    "ernie4_5-moe": as_is,
    "exaone-moe": as_is,
    "exaone4": as_is,
    "falcon": grouped_qkv,
    "gemma": as_is,
    "gemma2": as_is,
    "gemma3": as_is,
    "gemma4": as_is,
    "glm4": glm4_rows,
    "glm4moe": as_is,
    "gpt-oss": as_is,
    "gpt2": as_is,  # PEFT stores A and B of a Conv1D as of a linear layer
    "gptneox": grouped_qkv,
    "granite": rope_pairs,
    "granitemoe": rope_pairs,
    "hunyuan-dense": as_is,
    "hunyuan-moe": as_is,
    "jais2": as_is,
    "lfm2": as_is,
    "llama": rope_pairs,
    "minimax-m2": as_is,
    "mistral3": rope_pairs,
    "mpt": as_is,
    "nemotron": as_is,
    "olmo": rope_pairs,
    "olmo2": as_is,
    "olmoe": as_is,
    "phi2": as_is,
    "phi3": as_is,
    "qwen2": as_is,
    "qwen2moe": as_is,
    "qwen2vl": as_is,
    "qwen3": as_is,
    "qwen3moe": as_is,
    "qwen3vl": as_is,
    "seed_oss": as_is,
    "smollm3": rope_pairs,
    "stablelm": as_is,
    "starcoder": as_is,
    "starcoder2": as_is,
}
