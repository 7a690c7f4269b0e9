"""Families whose code is published with their files, and is not in transformers."""

from collections.abc import Mapping
from typing import Any

from checkpoints import EXACT, ROUNDED, Checkpoint

N_VOCAB, N_EMBD, N_FF, N_HEAD, N_HEAD_KV, N_DIM = 271, 64, 96, 4, 2, 16
_Q, _KV = N_HEAD * N_DIM, N_HEAD_KV * N_DIM

_LLAMA = {
    "vocab_size": N_VOCAB,
    "hidden_size": N_EMBD,
    "intermediate_size": N_FF,
    "num_hidden_layers": 2,
    "num_attention_heads": N_HEAD,
    "num_key_value_heads": N_HEAD_KV,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
_MHA = {**_LLAMA, "num_key_value_heads": N_HEAD}
_GPT = {
    "vocab_size": N_VOCAB,
    "n_embd": N_EMBD,
    "n_layer": 2,
    "n_head": N_HEAD,
    "n_positions": 128,
    "layer_norm_epsilon": 1e-5,
}
_MOE = {"moe_intermediate_size": 32, "num_experts_per_tok": 2, "norm_topk_prob": True}
_BLOCK = "model.layers.{}"
_MLP = {
    f"{_BLOCK}.mlp.gate_proj": (N_FF, N_EMBD),
    f"{_BLOCK}.mlp.up_proj": (N_FF, N_EMBD),
    f"{_BLOCK}.mlp.down_proj": (N_EMBD, N_FF),
}
_OUT = {f"{_BLOCK}.self_attn.o_proj": (N_EMBD, _Q)}


def _qkv(n_kv: int) -> dict[str, tuple[int, int]]:
    widths = {"q": _Q, "k": n_kv, "v": n_kv}
    return {f"{_BLOCK}.self_attn.{name}_proj": (n, N_EMBD) for name, n in widths.items()}


def _vectors(*names: str, n: int = N_EMBD) -> dict[str, tuple[int, ...]]:
    return dict.fromkeys(names, (n,))


def _experts(n_ff: int = 32) -> dict[str, tuple[int, ...]]:
    """Four experts of a block, which are not adapted, and a router."""
    shapes = {"gate_proj": (n_ff, N_EMBD), "up_proj": (n_ff, N_EMBD), "down_proj": (N_EMBD, n_ff)}
    return {
        f"{_BLOCK}.mlp.gate.weight": (4, N_EMBD),
        **{
            f"{_BLOCK}.mlp.experts.{expert}.{name}.weight": shape
            for expert in range(4)
            for name, shape in shapes.items()
        },
    }


def _shared(n_ff: int = 32) -> dict[str, tuple[int, int]]:
    return {
        f"{_BLOCK}.mlp.shared_experts.gate_proj": (n_ff, N_EMBD),
        f"{_BLOCK}.mlp.shared_experts.up_proj": (n_ff, N_EMBD),
        f"{_BLOCK}.mlp.shared_experts.down_proj": (N_EMBD, n_ff),
    }


_NORMS = _vectors(
    f"{_BLOCK}.input_layernorm.weight",
    f"{_BLOCK}.post_attention_layernorm.weight",
    "model.norm.weight",
)


def _checkpoint(
    name: str,
    arch: str,
    model: str,
    config: Mapping[str, Any],
    linear: Mapping[str, tuple[int, int]],
    others: Mapping[str, tuple[int, ...]],
    **more: Any,
) -> Checkpoint:
    outside = {"embedding": "model.embed_tokens", "head": "lm_head", "tolerance": EXACT, **more}
    return Checkpoint(name, arch, {**config, "architectures": [model]}, linear, others, **outside)


_GPT_BLOCK = "transformer.h.{}"
_GPT_NORMS = _vectors(
    f"{_GPT_BLOCK}.ln_1.weight", f"{_GPT_BLOCK}.ln_2.weight", "transformer.ln_f.weight"
)
_GPT_BIASES = _vectors(
    f"{_GPT_BLOCK}.ln_1.bias", f"{_GPT_BLOCK}.ln_2.bias", "transformer.ln_f.bias"
)

PUBLISHED = [
    _checkpoint(
        "InternLM2",
        "internlm2",
        "InternLM2ForCausalLM",
        _LLAMA,
        {
            f"{_BLOCK}.attention.wqkv": (_Q + 2 * _KV, N_EMBD),
            f"{_BLOCK}.attention.wo": (N_EMBD, _Q),
            f"{_BLOCK}.feed_forward.w1": (N_FF, N_EMBD),
            f"{_BLOCK}.feed_forward.w3": (N_FF, N_EMBD),
            f"{_BLOCK}.feed_forward.w2": (N_EMBD, N_FF),
        },
        _vectors(
            f"{_BLOCK}.attention_norm.weight", f"{_BLOCK}.ffn_norm.weight", "model.norm.weight"
        ),
        embedding="model.tok_embeddings",
        head="output",
    ),
    _checkpoint(
        "InternLM3",
        "llama",
        "InternLM3ForCausalLM",
        {**_LLAMA, "head_dim": N_DIM},
        {**_qkv(_KV), **_OUT, **_MLP},
        _NORMS,
    ),
    _checkpoint(
        "MiniCPM",
        "minicpm",
        "MiniCPMForCausalLM",
        {**_LLAMA, "scale_emb": 2.0, "scale_depth": 1.4, "dim_model_base": 16},
        {**_qkv(_KV), **_OUT, **_MLP},
        _NORMS,
    ),
    _checkpoint(
        "XVERSE", "xverse", "XverseForCausalLM", _MHA, {**_qkv(_Q), **_OUT, **_MLP}, _NORMS
    ),
    _checkpoint(
        "Orion",
        "orion",
        "OrionForCausalLM",
        _LLAMA,
        {**_qkv(_KV), **_OUT, **_MLP},
        {**_NORMS, **{name.replace(".weight", ".bias"): shape for name, shape in _NORMS.items()}},
    ),
    _checkpoint(
        "EXAONE 3",
        "exaone",
        "ExaoneForCausalLM",
        {**_LLAMA, "activation_function": "silu", "num_layers": 2},
        {
            f"{_GPT_BLOCK}.attn.attention.q_proj": (_Q, N_EMBD),
            f"{_GPT_BLOCK}.attn.attention.k_proj": (_KV, N_EMBD),
            f"{_GPT_BLOCK}.attn.attention.v_proj": (_KV, N_EMBD),
            f"{_GPT_BLOCK}.attn.attention.out_proj": (N_EMBD, _Q),
            f"{_GPT_BLOCK}.mlp.c_fc_0": (N_FF, N_EMBD),
            f"{_GPT_BLOCK}.mlp.c_fc_1": (N_FF, N_EMBD),
            f"{_GPT_BLOCK}.mlp.c_proj": (N_EMBD, N_FF),
        },
        _GPT_NORMS,
        embedding="transformer.wte",
    ),
    _checkpoint(
        "Qwen",
        "qwen",
        "QWenLMHeadModel",
        {**_MHA, "intermediate_size": 2 * N_FF, "layer_norm_epsilon": 1e-6},
        {
            f"{_GPT_BLOCK}.attn.c_attn": (3 * _Q, N_EMBD),
            f"{_GPT_BLOCK}.attn.c_proj": (N_EMBD, _Q),
            f"{_GPT_BLOCK}.mlp.w1": (N_FF, N_EMBD),
            f"{_GPT_BLOCK}.mlp.w2": (N_FF, N_EMBD),
            f"{_GPT_BLOCK}.mlp.c_proj": (N_EMBD, N_FF),
        },
        {**_GPT_NORMS, f"{_GPT_BLOCK}.attn.c_attn.bias": (3 * _Q,)},
        embedding="transformer.wte",
    ),
    _checkpoint(
        "CodeShell",
        "codeshell",
        "CodeShellForCausalLM",
        {**_GPT, "num_query_groups": N_HEAD_KV},
        {
            f"{_GPT_BLOCK}.attn.c_attn": (_Q + 2 * _KV, N_EMBD),
            f"{_GPT_BLOCK}.attn.c_proj": (N_EMBD, _Q),
            f"{_GPT_BLOCK}.mlp.c_fc": (4 * N_EMBD, N_EMBD),
            f"{_GPT_BLOCK}.mlp.c_proj": (N_EMBD, 4 * N_EMBD),
        },
        {
            **_GPT_NORMS,
            **_GPT_BIASES,
            f"{_GPT_BLOCK}.attn.c_attn.bias": (_Q + 2 * _KV,),
            f"{_GPT_BLOCK}.attn.c_proj.bias": (N_EMBD,),
            f"{_GPT_BLOCK}.mlp.c_fc.bias": (4 * N_EMBD,),
            f"{_GPT_BLOCK}.mlp.c_proj.bias": (N_EMBD,),
        },
        embedding="transformer.wte",
        tolerance=ROUNDED,
    ),
    _checkpoint(
        "Refact",
        "refact",
        "GPTRefactForCausalLM",
        _GPT,
        {
            f"{_GPT_BLOCK}.attn.q": (_Q, N_EMBD),
            f"{_GPT_BLOCK}.attn.kv": (2 * N_DIM, N_EMBD),
            f"{_GPT_BLOCK}.attn.c_proj": (N_EMBD, _Q),
            f"{_GPT_BLOCK}.mlp.gate_up_proj": (512, N_EMBD),
            f"{_GPT_BLOCK}.mlp.c_proj": (N_EMBD, 256),
        },
        _GPT_NORMS,
        embedding="transformer.wte",
    ),
    _checkpoint(
        "PLaMo 3",
        "plamo3",
        "Plamo3ForCausalLM",
        {**_LLAMA, "head_dim": N_DIM, "window_size": 64, "sliding_window_pattern": 2},
        {
            "model.layers.layers.{}.mixer.qkv_proj": (_Q + 2 * _KV, N_EMBD),
            "model.layers.layers.{}.mixer.o_proj": (N_EMBD, _Q),
            "model.layers.layers.{}.mlp.gate_up_proj": (2 * N_FF, N_EMBD),
            "model.layers.layers.{}.mlp.down_proj": (N_EMBD, N_FF),
        },
        {
            **_vectors(
                *(
                    f"model.layers.layers.{{}}.{name}_norm.weight"
                    for name in ("pre_mixer", "post_mixer", "pre_mlp", "post_mlp")
                ),
                "model.norm.weight",
            ),
            **_vectors(
                "model.layers.layers.{}.mixer.q_norm.weight",
                "model.layers.layers.{}.mixer.k_norm.weight",
                n=N_DIM,
            ),
        },
    ),
    _checkpoint(
        "openPangu",
        "pangu-embedded",
        "PanguEmbeddedForCausalLM",
        _LLAMA,
        {**_qkv(_KV), **_OUT, **_MLP},
        {
            **_NORMS,
            **{f"{name}.bias": (n_out,) for name, (n_out, _) in {**_qkv(_KV), **_OUT}.items()},
        },
    ),
    _checkpoint(
        "Maincoder",
        "maincoder",
        "MaincoderForCausalLM",
        {**_LLAMA, "head_dim": N_DIM},
        {**_qkv(_KV), **_OUT, **_MLP},
        {
            **_NORMS,
            **_vectors(
                f"{_BLOCK}.self_attn.q_norm.weight", f"{_BLOCK}.self_attn.k_norm.weight", n=N_DIM
            ),
        },
    ),
    _checkpoint(
        "OpenELM",
        "openelm",
        "OpenELMForCausalLM",
        {
            "vocab_size": N_VOCAB,
            "model_dim": N_EMBD,
            "head_dim": N_DIM,
            "num_transformer_layers": 2,
            "num_query_heads": [4, 4],
            "num_kv_heads": [2, 2],
            "ffn_multipliers": [1.5, 1.5],
            "ffn_dim_divisor": 32,
            "max_context_length": 128,
            "rope_freq_constant": 10000,
        },
        {
            "transformer.layers.{}.attn.qkv_proj": (_Q + 2 * _KV, N_EMBD),
            "transformer.layers.{}.attn.out_proj": (N_EMBD, _Q),
            "transformer.layers.{}.ffn.proj_1": (2 * N_FF, N_EMBD),
            "transformer.layers.{}.ffn.proj_2": (N_EMBD, N_FF),
        },
        {
            **_vectors(
                "transformer.layers.{}.attn_norm.weight",
                "transformer.layers.{}.ffn_norm.weight",
                "transformer.norm.weight",
            ),
            **_vectors(
                "transformer.layers.{}.attn.q_norm.weight",
                "transformer.layers.{}.attn.k_norm.weight",
                n=N_DIM,
            ),
        },
        embedding="transformer.token_embeddings",
        head=None,
    ),
    _checkpoint(
        "Ling",
        "bailingmoe",
        "BailingMoeForCausalLM",
        {
            **_LLAMA,
            **_MOE,
            "head_dim": N_DIM,
            "num_experts": 4,
            "num_shared_experts": 1,
            "first_k_dense_replace": 0,
        },
        {
            f"{_BLOCK}.attention.query_key_value": (_Q + 2 * _KV, N_EMBD),
            f"{_BLOCK}.attention.dense": (N_EMBD, _Q),
            **_shared(),
        },
        {**_NORMS, **_experts()},
        embedding="model.word_embeddings",
    ),
    _checkpoint(
        "DeepSeek MoE",
        "deepseek",
        "DeepseekForCausalLM",
        {
            **_LLAMA,
            **_MOE,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "first_k_dense_replace": 0,
        },
        {**_qkv(_KV), **_OUT, **_shared()},
        {**_NORMS, **_experts()},
    ),
]
