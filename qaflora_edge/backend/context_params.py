"""What a context is made with: llama_context_params, and whether it computes flash attention."""

import os
from typing import Any

from qaflora_edge.backend.batch import n_ubatch
from qaflora_edge.backend.library import forget_said
from qaflora_edge.backend.model import Model
from qaflora_edge.config import KV_TYPES

_FLASH_ATTN_AUTO, _FLASH_ATTN_OFF, _FLASH_ATTN_ON = -1, 0, 1  # llama.h llama_flash_attn_type
_MAX_SCORES_BYTES = 256 << 20  # 8,192 tokens of a base with 25 heads


def context_params(
    model: Model,
    *,
    n_token: int,
    n_seq: int = 1,
    threads: int | None = None,
    kv_type: str = "f16",
    flash_attn: bool | None = None,
    is_unified: bool = False,
    is_probe: bool = False,
) -> Any:
    """llama_context_params, and the reasons of earlier failures forgotten.

    n_token     that all sequences together can hold, and that one batch can have
    flash_attn  None: by the rule of _flash_attn_type()
    """
    forget_said()
    params = model._lib.llama_context_default_params()
    params.n_ctx = params.n_batch = n_token
    params.n_ubatch = min(params.n_ubatch, n_token)
    params.n_seq_max = params.n_outputs_max = n_seq
    params.n_threads = params.n_threads_batch = threads or default_threads()
    params.type_k = params.type_v = KV_TYPES[kv_type]
    params.flash_attn_type = _flash_attn_type(
        model, flash_attn, kv_type, n_token if is_unified else n_token // n_seq, is_probe
    )
    params.kv_unified = is_unified
    params.no_perf = False
    return params


def _flash_attn_type(
    model: Model, flash_attn: bool | None, kv_type: str, n_ctx: int, is_probe: bool
) -> int:
    """llama.h llama_flash_attn_type.

    On the CPU flash attention computes tiles of many rows, which is what reading a prompt takes,
    and is slow for the single rows of decoding, the more tokens are held the slower. Without it the
    scores of a piece of a prompt are held at once, and values cannot be quantised. What is scored
    is computed as answers are.
    """
    if flash_attn is not None:
        return _FLASH_ATTN_ON if flash_attn else _FLASH_ATTN_OFF
    if not model.is_on_cpu:
        return _FLASH_ATTN_AUTO  # llama.cpp looks at what the device can
    scores_bytes = 4 * model.n_head * n_ctx * n_ubatch()
    is_slow = not is_probe and kv_type in ("f16", "f32")
    is_off = is_slow and scores_bytes <= _MAX_SCORES_BYTES
    return _FLASH_ATTN_OFF if is_off else _FLASH_ATTN_ON


def default_threads() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1
