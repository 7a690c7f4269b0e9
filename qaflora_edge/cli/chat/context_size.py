"""How large the context of a chat is, where nobody says."""

from __future__ import annotations

import os
from pathlib import Path

from qaflora_edge.bundles.open import base_of
from qaflora_edge.formats.gguf_header import GgufHeader, read_gguf_header

LARGEST, LEAST = 8192, 2048  # tokens
_PART = 8  # of the memory that this machine has
_BYTES = {"f32": 4.0, "f16": 2.0, "q8_0": 34 / 32}  # of a value in the KV cache


def context_size(folder: Path, kv_type: str) -> int:
    """Tokens of the context of a chat with a bundle.

    What the base was trained for, at most LARGEST, and half as often as its KV cache would take
    more than an eighth of this machine's memory.
    """
    base_path = base_of(folder)
    if base_path is None:  # opening the bundle says so
        return LEAST
    header = read_gguf_header(base_path)
    bytes_per_token = _BYTES[kv_type] * n_kv_value(header)
    size = min(LARGEST, _n_ctx_train(header))
    while size > LEAST and size * bytes_per_token > memory_bytes() / _PART:
        size = max(LEAST, size // 2)
    return size


def n_kv_value(header: GgufHeader) -> int:
    """Values that the KV cache holds for a token, by the rows of the weights that make them."""
    n = 0
    for name, info in header.tensors.items():
        if name.endswith((".attn_k.weight", ".attn_v.weight")):
            n += info.shape[0]
        elif name.endswith(".attn_qkv.weight"):
            n += max(0, info.shape[0] - header.n_embd)
    return n


def _n_ctx_train(header: GgufHeader) -> int:
    value = header.metadata.get(f"{header.architecture}.context_length")
    return value if isinstance(value, int) and value > 0 else LEAST


def memory_bytes() -> float:
    """Memory of this machine; without end where the system does not say."""
    try:
        return float(os.sysconf("SC_PHYS_PAGES")) * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows
        return float("inf")
