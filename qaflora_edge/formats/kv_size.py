"""How much memory the KV state of a token takes, by what a base's file says."""

from __future__ import annotations

from qaflora_edge.formats.gguf_header import GgufHeader

_BYTES = {"f32": 4.0, "f16": 2.0, "q8_0": 34 / 32}  # of a value


def kv_bytes(header: GgufHeader, kv_type: str) -> float:
    """Bytes that a token takes."""
    return _BYTES[kv_type] * n_kv_value(header)


def n_kv_value(header: GgufHeader) -> int:
    """Values that the KV cache holds for a token, by the rows of the weights that make them."""
    n = 0
    for name, info in header.tensors.items():
        if name.endswith((".attn_k.weight", ".attn_v.weight")):
            n += info.shape[0]
        elif name.endswith(".attn_qkv.weight"):
            n += max(0, info.shape[0] - header.n_embd)
    return n
