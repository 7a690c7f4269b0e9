"""Matrices that llama.cpp multiplies without looking for an adapter. No I/O.

It loads a LoRA of them without a word and ignores it. Read in llama.cpp 0c1e5709, src/models/*.cpp:
every ggml_mul_mat of a layer's tensor that does not go through build_lora_mm; the tests read it
again.
"""

import re
from collections.abc import Mapping

_LATENT = ("attn_q_a", "attn_q_b", "attn_kv_a_mqa", "attn_k_b")
_INDEXER = ("indexer.attn_k", "indexer.attn_q_b", "indexer.proj")
_SPARSE = (*_LATENT, *_INDEXER, "output")
_DEEPSEEK2 = (*_LATENT, "attn_kv_b", "attn_q", "output")
_RWKV6 = ("time_mix_decay_w1", "time_mix_decay_w2", "time_mix_w1")
_RWKV7 = tuple(f"time_mix_{name}" for name in ("a1", "a2", "g1", "g2", "v1", "v2", "w1", "w2"))
_NEMOTRON = ("ffn_latent_down", "ffn_latent_up")

# general.architecture -> kinds of tensors
BYPASSED: Mapping[str, tuple[str, ...]] = {
    "bailingmoe3": (
        *("attn_gate", "attn_k_b", "attn_kv_a_mqa", "attn_output", "attn_q", "attn_q_a"),
        *("attn_q_b", "nextn.eh_proj", "output", "ssm_beta", "ssm_f_a", "ssm_g_a"),
    ),
    "deepseek2": _DEEPSEEK2,
    "deepseek2-ocr": _DEEPSEEK2,
    "deepseek32": _SPARSE,
    "deepseek4": ("attn_output_a", "output"),
    "dots3note": _SPARSE,
    "gemma3n": ("altup_proj", "altup_router", "altup_unembd_proj"),
    "glm-dsa": _SPARSE,
    "glm5-next": (
        *_SPARSE,
        *("attn_output", "attn_v_b", "indexer.kpool_gate", "ssm_beta", "ssm_f_a", "ssm_f_b"),
        *("ssm_g_a", "ssm_g_b"),
    ),
    "graniteswitch": ("attn_qkv",),
    "hy_v4": (*_SPARSE, "attn_gate"),
    "kimi-k3": (
        *(*_DEEPSEEK2, "attn_gate", "attn_output", "ffn_down", "ffn_down_shexp", "ffn_gate"),
        *("ffn_gate_inp", "ffn_gate_shexp", "ffn_routed_down", "ffn_routed_up", "ffn_up"),
        *("ffn_up_shexp", "ssm_beta", "ssm_f_a", "ssm_f_b", "ssm_g"),
    ),
    "kimi-linear": (
        *("attn_k_b", "attn_kv_a_mqa", "attn_kv_b", "attn_output", "attn_q", "attn_qkv"),
        *("output", "ssm_beta", "ssm_f_a", "ssm_f_b", "ssm_g_a", "ssm_g_b"),
    ),
    "minicpm3": ("attn_q_a", "attn_q_b", "attn_kv_a_mqa", "attn_kv_b"),
    "mistral4": _DEEPSEEK2,
    "nemotron_h": _NEMOTRON,
    "nemotron_h_moe": _NEMOTRON,
    "plm": ("attn_q", "attn_kv_a_mqa", "attn_kv_b"),
    "rwkv6": _RWKV6,
    "rwkv6qwen2": _RWKV6,
    "rwkv7": _RWKV7,
    "arwkv7": _RWKV7,
}
_NOT_MULTIPLIED = re.compile(r"(conv|conv1d|_norm|rel_b)$|_embd$|^rope_freqs$|^token_types$")


def module_kind(base_name: str) -> str:
    """Give attn_q of blk.3.attn_q.weight, and output of output.weight."""
    return re.sub(r"^blk\.\d+\.", "", base_name).removesuffix(".weight")


def is_bypassed(architecture: str, base_name: str) -> bool:
    """Tell whether a LoRA on a tensor of a base would be ignored.

    base_name  such as blk.0.attn_q_a.weight
    """
    kind = module_kind(base_name)
    if kind in BYPASSED.get(architecture, ()):
        return True
    return base_name != "token_embd.weight" and _NOT_MULTIPLIED.search(kind) is not None
