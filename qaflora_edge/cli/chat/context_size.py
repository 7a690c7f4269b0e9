"""How large the context of a chat is, where nobody says."""

import os
from pathlib import Path

from qaflora_edge.bundles.open import base_of
from qaflora_edge.formats.gguf import GgufHeader, kv_bytes, read_gguf_header

LARGEST, LEAST = 8192, 2048  # tokens
_PART = 8  # of the memory that this machine has


def context_size(folder: Path, kv_type: str) -> int:
    """Tokens of the context of a chat with a bundle.

    What the base was trained for, at most LARGEST, and half as often as its KV cache would take
    more than an eighth of this machine's memory.
    """
    base_path = base_of(folder)
    if base_path is None:  # opening the bundle says so
        return LEAST
    header = read_gguf_header(base_path)
    bytes_per_token = kv_bytes(header, kv_type)
    size = min(LARGEST, _n_ctx_train(header))
    while size > LEAST and size * bytes_per_token > memory_bytes() / _PART:
        size = max(LEAST, size // 2)
    return size


def _n_ctx_train(header: GgufHeader) -> int:
    value = header.metadata.get(f"{header.architecture}.context_length")
    return value if isinstance(value, int) and value > 0 else LEAST


def memory_bytes() -> float:
    """Memory of this machine; without end where the system does not say."""
    try:
        return float(os.sysconf("SC_PHYS_PAGES")) * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows
        return float("inf")
