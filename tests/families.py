"""Families of models that transformers can make tiny, one or more for each architecture.

Rows of the table in docs/convert.md. Widths are the least that every family's own rules allow.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from checkpoints import EXACT, ROUNDED, Checkpoint
from published import PUBLISHED

COARSE = 2e-2  # gpt-oss


@dataclass(frozen=True)
class Family:
    """One class of transformers, and what the converters need to know of it.

    name      a row's first column
    arch      the GGUF's general.architecture
    model     transformers' class; `config` is that of its configuration
    targets   ends of the names of the modules to adapt; None: every linear layer but experts
    restored  fields of config.json that upstream reads and transformers does not write
    upstream  why upstream's adapter is another, if it is
    refuses_experts  whether LoRA of its experts is refused, which is not tried then
    """

    name: str
    arch: str
    model: str
    config: str
    options: Mapping[str, Any]
    tolerance: float = EXACT
    targets: tuple[str, ...] | None = None
    restored: Mapping[str, Any] = field(default_factory=dict)
    upstream: str = ""
    refuses_experts: bool = False

    @property
    def is_mixture(self) -> bool:
        """Whether its layers have experts that a router chooses from."""
        return any("expert" in name and value not in (0, 1) for name, value in self.options.items())


N_VOCAB = 271
_IDS = {"vocab_size": N_VOCAB, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
_LLAMA = {
    **_IDS,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_HEAD = {**_LLAMA, "head_dim": 16}
_MHA = {**_LLAMA, "num_key_value_heads": 4}
_WINDOW = {"sliding_window": 64}
_GEMMA = {**_HEAD, **_WINDOW, "query_pre_attn_scalar": 16}
_GPT = {**_IDS, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
_GEMMA_4 = {
    **_HEAD,
    **_WINDOW,
    "hidden_size_per_layer_input": 0,
    "global_head_dim": 16,
    "final_logit_softcapping": 30.0,  # llama.cpp's, where a config has none
    "layer_types": ["sliding_attention", "full_attention"],
}
_FALCON = {
    **_IDS,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bias": False,
    "alibi": False,
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
_HUNYUAN_EXPERTS = {
    "moe_topk": [2, 2],
    "moe_intermediate_size": [96, 96],
    "num_shared_expert": [1, 1],
}
_GRANITE = {
    **_LLAMA,
    "attention_multiplier": 0.25,
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.5,
    "logits_scaling": 4.0,
}
_GRANITE_SHARED = {**_GRANITE, "shared_intermediate_size": 96}
_GRANITE_4 = {
    **_GRANITE_SHARED,
    "num_local_experts": 0,
    "num_experts_per_tok": 0,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
}
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_LINEAR_ATTENTION = ("in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj")
_EYE = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
_CLIP = {**_EYE, "num_hidden_layers": 1, "image_size": 28, "patch_size": 14}
_QWEN_EYE = {"depth": 1, "num_heads": 2}
_MROPE = {"mrope_section": [2, 3, 3]}
_LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
}
_INTERLEAVED = {
    "rope_type": "default",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "mrope_section": [2, 1, 1],
    "mrope_interleaved": True,
}
_QWEN35 = {**_HEAD, **_LINEAR, "rope_parameters": _INTERLEAVED}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}


def _family(name: str, arch: str, model: str, options: Mapping[str, Any], **more: Any) -> Family:
    stem = model.removesuffix("ForCausalLM").removesuffix("ForConditionalGeneration")
    return Family(name, arch, model, more.pop("config", f"{stem}Config"), options, **more)


_ALL = [
    _family("Llama", "llama", "LlamaForCausalLM", _LLAMA),
    _family("Mistral", "llama", "MistralForCausalLM", {**_LLAMA, "sliding_window": None}),
    _family("Mixtral", "llama", "MixtralForCausalLM", {**_LLAMA, "num_local_experts": 4}),
    _family(
        "LLaVA (Llama)",
        "llama",
        "LlavaForConditionalGeneration",
        {
            "text_config": {**_LLAMA, "model_type": "llama"},
            "vision_config": {**_CLIP, "model_type": "clip_vision_model"},
        },
    ),
    _family(
        "Ministral 3",
        "mistral3",
        "Ministral3ForCausalLM",
        {**_HEAD, "sliding_window": None, "rope_parameters": _YARN},
        upstream="its inner class, which writes, knows of no adapter",
    ),
    _family(
        "Mistral Small 3.1",
        "mistral3",
        "Mistral3ForConditionalGeneration",
        {
            "text_config": {**_HEAD, "model_type": "mistral", "sliding_window": None},
            "vision_config": {**_CLIP, "model_type": "pixtral", "head_dim": 16},
        },
        upstream="its inner class, which writes, knows of no adapter",
    ),
    _family("Qwen2", "qwen2", "Qwen2ForCausalLM", _LLAMA),
    _family(
        "Qwen2-MoE",
        "qwen2moe",
        "Qwen2MoeForCausalLM",
        {**_LLAMA, **_EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 64},
    ),
    _family(
        "Qwen2-VL",
        "qwen2vl",
        "Qwen2VLForConditionalGeneration",
        {
            "text_config": {**_LLAMA, "rope_scaling": {"type": "mrope", **_MROPE}},
            "vision_config": {**_QWEN_EYE, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2},
        },
        tolerance=ROUNDED,
    ),
    _family(
        "Qwen2.5-VL",
        "qwen2vl",
        "Qwen2_5_VLForConditionalGeneration",
        {
            "text_config": {**_LLAMA, "rope_scaling": {"type": "mrope", **_MROPE}},
            "vision_config": {**_QWEN_EYE, **_EYE, "out_hidden_size": 64},
        },
        config="Qwen2_5_VLConfig",
        tolerance=ROUNDED,
    ),
    _family("Qwen3", "qwen3", "Qwen3ForCausalLM", _HEAD),
    _family(
        "Qwen3-MoE",
        "qwen3moe",
        "Qwen3MoeForCausalLM",
        {**_HEAD, **_EXPERTS, "num_experts": 4, "norm_topk_prob": True},
    ),
    _family(
        "Qwen3-VL",
        "qwen3vl",
        "Qwen3VLForConditionalGeneration",
        {
            "text_config": {
                **_HEAD,
                "rope_scaling": {"rope_type": "default", "mrope_interleaved": True, **_MROPE},
            },
            "vision_config": {
                **_QWEN_EYE,
                **_EYE,
                "out_hidden_size": 64,
                "deepstack_visual_indexes": [0],
            },
        },
        tolerance=ROUNDED,
    ),
    _family(
        "Qwen3-Next",
        "qwen3next",
        "Qwen3NextForCausalLM",
        {
            **_HEAD,
            **_LINEAR,
            **_EXPERTS,
            "num_experts": 4,
            "shared_expert_intermediate_size": 32,
        },
        targets=(*_ATTENTION, "in_proj_qkvz", "in_proj_ba", "out_proj"),
        upstream="it cannot take in_proj_qkvz apart",
    ),
    _family("Qwen3.5", "qwen35", "Qwen3_5ForCausalLM", _QWEN35, config="Qwen3_5TextConfig"),
    _family(
        "Qwen3.5 MoE",
        "qwen35moe",
        "Qwen3_5MoeForCausalLM",
        {**_QWEN35, **_EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 32},
        config="Qwen3_5MoeTextConfig",
        targets=(*_ATTENTION, *_LINEAR_ATTENTION),
    ),
    _family("Gemma", "gemma", "GemmaForCausalLM", _HEAD, tolerance=ROUNDED),
    _family("Gemma 2", "gemma2", "Gemma2ForCausalLM", _GEMMA, tolerance=ROUNDED),
    _family(
        "Gemma 3",
        "gemma3",
        "Gemma3ForCausalLM",
        _GEMMA,
        config="Gemma3TextConfig",
        tolerance=ROUNDED,
    ),
    _family(
        "Gemma 3, multimodal",
        "gemma3",
        "Gemma3ForConditionalGeneration",
        {"text_config": _GEMMA, "vision_config": _CLIP},
        tolerance=ROUNDED,
    ),
    _family(
        "Gemma 4, dense",
        "gemma4",
        "Gemma4ForCausalLM",
        _GEMMA_4,
        config="Gemma4TextConfig",
        tolerance=ROUNDED,
        restored={"global_head_dim": 16, "moe_intermediate_size": 0},
    ),
    _family(
        "Gemma 4, E2B",
        "gemma4",
        "Gemma4ForCausalLM",
        {
            **_GEMMA_4,
            "hidden_size_per_layer_input": 32,
            "vocab_size_per_layer_input": N_VOCAB,
            "num_hidden_layers": 3,
            "num_kv_shared_layers": 1,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        },
        config="Gemma4TextConfig",
        tolerance=ROUNDED,
        targets=(*_ATTENTION, *_MLP, "per_layer_input_gate", "per_layer_projection"),
        restored={"global_head_dim": 16, "moe_intermediate_size": 0},
    ),
    _family(
        "Gemma 4, MoE",
        "gemma4",
        "Gemma4ForCausalLM",
        {
            **_GEMMA_4,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
        },
        config="Gemma4TextConfig",
        tolerance=ROUNDED,
        targets=_ATTENTION,
        restored={"global_head_dim": 16},
        refuses_experts=True,
    ),
    _family(
        "Phi-2", "phi2", "PhiForCausalLM", {**_MHA, "intermediate_size": 256}, tolerance=ROUNDED
    ),
    _family(
        "Phi-3", "phi3", "Phi3ForCausalLM", {**_LLAMA, "original_max_position_embeddings": 128}
    ),
    _family(
        "GPT-2",
        "gpt2",
        "GPT2LMHeadModel",
        {**_GPT, "n_ctx": 128},
        config="GPT2Config",
        tolerance=ROUNDED,
        upstream="it swaps A and B of Conv1D layers",
    ),
    _family(
        "GPT-NeoX",
        "gptneox",
        "GPTNeoXForCausalLM",
        {name: value for name, value in _LLAMA.items() if name != "num_key_value_heads"},
        tolerance=ROUNDED,
        restored={"rotary_pct": 0.25},
    ),
    _family(
        "BLOOM",
        "bloom",
        "BloomForCausalLM",
        {**_IDS, "hidden_size": 64, "n_layer": 2, "n_head": 4},
        tolerance=ROUNDED,
    ),
    _family(
        "Falcon, one key",
        "falcon",
        "FalconForCausalLM",
        {**_FALCON, "multi_query": True, "new_decoder_architecture": False, "parallel_attn": True},
        tolerance=ROUNDED,
        restored={"num_kv_heads": None},
    ),
    _family(
        "Falcon, groups",
        "falcon",
        "FalconForCausalLM",
        {**_FALCON, "num_kv_heads": 2, "new_decoder_architecture": True},
        tolerance=ROUNDED,
    ),
    _family(
        "MPT",
        "mpt",
        "MptForCausalLM",
        {
            **_IDS,
            "d_model": 64,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 128,
            "expansion_ratio": 2,
        },
        tolerance=ROUNDED,
        restored={"architectures": ["MPTForCausalLM"]},
    ),
    _family("StarCoder", "starcoder", "GPTBigCodeForCausalLM", _GPT, tolerance=ROUNDED),
    _family("StarCoder2", "starcoder2", "Starcoder2ForCausalLM", _LLAMA, tolerance=ROUNDED),
    _family("StableLM", "stablelm", "StableLmForCausalLM", _MHA),
    _family("Nemotron", "nemotron", "NemotronForCausalLM", _HEAD),
    _family("Command R", "command-r", "CohereForCausalLM", _LLAMA),
    _family(
        "Command R7B",
        "cohere2",
        "Cohere2ForCausalLM",
        {**_LLAMA, **_WINDOW},
        restored={"rotary_pct": 1.0},
    ),
    _family("OLMo", "olmo", "OlmoForCausalLM", _LLAMA),
    _family("OLMo 2", "olmo2", "Olmo2ForCausalLM", _LLAMA),
    _family("OLMo 3", "olmo2", "Olmo3ForCausalLM", {**_LLAMA, **_WINDOW}),
    _family(
        "OLMoE", "olmoe", "OlmoeForCausalLM", {**_MHA, "num_experts": 4, "num_experts_per_tok": 2}
    ),
    _family("Granite", "granite", "GraniteForCausalLM", _GRANITE),
    _family(
        "Granite MoE",
        "granitemoe",
        "GraniteMoeForCausalLM",
        {**_GRANITE, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    _family(
        "Granite MoE, shared",
        "granitemoe",
        "GraniteMoeSharedForCausalLM",
        {**_GRANITE_SHARED, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    _family(
        "Granite 4, dense",
        "granite",
        "GraniteMoeHybridForCausalLM",
        {
            **_GRANITE_4,
            "layer_types": ["attention", "attention"],
            "position_embedding_type": "rope",
        },
        restored={"layer_types": ["attention", "attention"], "num_experts_per_tok": None},
    ),
    _family(
        "Granite 4, hybrid",
        "granitehybrid",
        "GraniteMoeHybridForCausalLM",
        {**_GRANITE_4, "mamba_n_groups": 1, "layer_types": ["mamba", "attention"]},
        restored={"layer_types": ["mamba", "attention"]},
    ),
    _family("GLM", "chatglm", "GlmForCausalLM", _HEAD, tolerance=ROUNDED),
    _family("GLM-4", "glm4", "Glm4ForCausalLM", _HEAD),
    _family(
        "GLM-4V",
        "glm4",
        "Glm4vForConditionalGeneration",
        {
            "image_token_id": 1,
            "video_token_id": 2,
            "image_start_token_id": 3,
            "image_end_token_id": 4,
            "video_start_token_id": 5,
            "video_end_token_id": 6,
            "text_config": {
                **_HEAD,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "partial_rotary_factor": 0.5,
                    "mrope_section": [2, 1, 1],
                },
            },
            "vision_config": {
                **_QWEN_EYE,
                **_EYE,
                "out_hidden_size": 64,
                "image_size": 28,
                "patch_size": 14,
            },
        },
        upstream="it stops with an assertion",
    ),
    _family(
        "GLM-4.5",
        "glm4moe",
        "Glm4MoeForCausalLM",
        {**_HEAD, **_EXPERTS, "n_routed_experts": 4, "first_k_dense_replace": 1},
        targets=_ATTENTION,
    ),
    _family("ERNIE 4.5", "ernie4_5", "Ernie4_5ForCausalLM", _HEAD),
    _family(
        "ERNIE 4.5 MoE",
        "ernie4_5-moe",
        "Ernie4_5_MoeForCausalLM",
        {
            **_LLAMA,
            "intermediate_size": 64,
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": 32,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
            "moe_layer_interval": 1,
        },
        targets=_ATTENTION,
    ),
    _family(
        "PaddleOCR-VL",
        "paddleocr",
        "PaddleOCRVLForConditionalGeneration",
        {
            "text_config": {**_HEAD, "rope_scaling": {"rope_type": "default", **_MROPE}},
            "vision_config": {**_EYE, "num_hidden_layers": 1},
        },
    ),
    _family("EXAONE 4", "exaone4", "Exaone4ForCausalLM", {**_HEAD, **_WINDOW}),
    _family(
        "EXAONE 4.5",
        "exaone4",
        "Exaone4_5_ForConditionalGeneration",
        {
            "text_config": {**_HEAD, **_WINDOW, "model_type": "exaone4"},
            "vision_config": {**_QWEN_EYE, **_EYE, "out_hidden_size": 64},
        },
        config="Exaone4_5_Config",
    ),
    _family(
        "EXAONE MoE",
        "exaone-moe",
        "ExaoneMoeForCausalLM",
        {
            **_HEAD,
            **_WINDOW,
            **_EXPERTS,
            "num_experts": 4,
            "num_shared_experts": 1,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
        },
        targets=_ATTENTION,
        restored={"scoring_func": "sigmoid"},
    ),
    _family("SmolLM3", "smollm3", "SmolLM3ForCausalLM", _LLAMA),
    _family("Hunyuan", "hunyuan-dense", "HunYuanDenseV1ForCausalLM", _HEAD),
    _family(
        "Hunyuan MoE",
        "hunyuan-moe",
        "HunYuanMoEV1ForCausalLM",
        {**_HEAD, "num_experts": 4, **_HUNYUAN_EXPERTS},
        targets=_ATTENTION,
        restored=_HUNYUAN_EXPERTS,
    ),
    _family("Seed-OSS", "seed_oss", "SeedOssForCausalLM", _HEAD),
    _family("Apertus", "apertus", "ApertusForCausalLM", _LLAMA),
    _family("Arcee", "arcee", "ArceeForCausalLM", _LLAMA),
    _family(
        "Trinity",
        "afmoe",
        "AfmoeForCausalLM",
        {
            **_HEAD,
            **_WINDOW,
            **_EXPERTS,
            "num_experts": 4,
            "num_shared_experts": 1,
            "num_dense_layers": 1,
            "mup_enabled": True,
        },
        targets=_ATTENTION,
        restored={"score_func": "sigmoid", "route_norm": True},
    ),
    _family("Jais 2", "jais2", "Jais2ForCausalLM", _HEAD),
    _family(
        "gpt-oss",
        "gpt-oss",
        "GptOssForCausalLM",
        {**_HEAD, **_WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2},
        tolerance=COARSE,
    ),
    _family(
        "dots.llm1",
        "dots1",
        "Dots1ForCausalLM",
        {
            **_HEAD,
            **_EXPERTS,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": True,
        },
        targets=_ATTENTION,
        restored={"scoring_func": "sigmoid"},
    ),
    _family(
        "DBRX",
        "dbrx",
        "DbrxForCausalLM",
        {
            "vocab_size": N_VOCAB,
            "d_model": 64,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 128,
            "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 64, "moe_num_experts": 4},
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        },
    ),
    _family(
        "MiniMax-M2",
        "minimax-m2",
        "MiniMaxM2ForCausalLM",
        {**_HEAD, "num_local_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 16},
        targets=_ATTENTION,
        restored={"scoring_func": "sigmoid", "rotary_dim": 16},
    ),
    _family(
        "LFM2",
        "lfm2",
        "Lfm2ForCausalLM",
        {
            **_LLAMA,
            "layer_types": ["conv", "full_attention"],
            "block_auto_adjust_ff_dim": False,
        },
    ),
    _family(
        "LFM2 MoE",
        "lfm2moe",
        "Lfm2MoeForCausalLM",
        {
            **_LLAMA,
            **_EXPERTS,
            "num_experts": 4,
            "num_dense_layers": 1,
            "layer_types": ["conv", "full_attention"],
        },
        upstream="it leaves the head out",
    ),
    _family(
        "Jamba",
        "jamba",
        "JambaForCausalLM",
        {
            **_LLAMA,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 1,
            "num_experts_per_tok": 1,
            "use_mamba_kernels": False,
        },
        # transformers ignores LoRA of dt_proj
        targets=(*_ATTENTION, *_MLP, "in_proj", "x_proj", "out_proj"),
    ),
    # PEFT refuses LoRA of out_proj in these
    _family(
        "Mamba",
        "mamba",
        "MambaForCausalLM",
        {**_IDS, "hidden_size": 64, "num_hidden_layers": 2},
        targets=("in_proj", "x_proj"),
    ),
    _family(
        "Mamba 2",
        "mamba2",
        "Mamba2ForCausalLM",
        {
            **_IDS,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "state_size": 16,
            "num_heads": 8,
            "head_dim": 16,
            "n_groups": 1,
        },
        targets=("in_proj",),
    ),
]
AnyFamily = Family | Checkpoint
FAMILIES: Mapping[str, AnyFamily] = {family.name: family for family in (*_ALL, *PUBLISHED)}
# Those whose experts are adapted too.
MIXTURES = [family for family in _ALL if family.is_mixture and not family.refuses_experts]
# Its blocks pass four streams on. Sparsity and windows are as llama.cpp has them in its code.
GEMMA_3N = _family(
    "Gemma 3n",
    "gemma3n",
    "Gemma3nForCausalLM",
    {
        **_HEAD,
        **_WINDOW,
        "vocab_size_per_layer_input": N_VOCAB,
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "sliding_attention"],
        "activation_sparsity_pattern": [0.95, 0.95],
    },
    config="Gemma3nTextConfig",
    targets=(*_ATTENTION, *_MLP),
)
