"""Tiny transformers models with PEFT adapters: the witnesses of the PEFT reader and converter."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny


def peft_model(base: tiny.TinyBase, folder: Path, **lora: Any) -> Any:
    """Make a float32 PEFT model of a tiny base's dimensions, with random A and B, and save it.

    Its base weights are random too: only A, B and their scale are of interest. What PEFT reads
    back is returned.
    """
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    config_class, model_class = {
        "llama": ("LlamaConfig", "LlamaForCausalLM"),
        "qwen2": ("Qwen2Config", "Qwen2ForCausalLM"),
        "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM"),
    }[base.arch]
    config = getattr(transformers, config_class)(
        hidden_size=base.n_embd,
        intermediate_size=base.n_ff,
        num_hidden_layers=base.n_layer,
        num_attention_heads=base.n_head,
        num_key_value_heads=base.n_head_kv,
        head_dim=base.n_head_dim,
        vocab_size=base.n_vocab,
        tie_word_embeddings=base.tied,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    lora = {"r": 4, "lora_alpha": 8, "target_modules": list(tiny.HF_TARGETS), **lora}
    with warnings.catch_warnings():  # of PEFT and transformers about themselves
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(
            getattr(transformers, model_class)(config),
            peft.LoraConfig(task_type="CAUSAL_LM", **lora),
        )
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(folder)
        # Loaded anew, for PEFT writes the patterns sorted and their order decides.
        return peft.PeftModel.from_pretrained(getattr(transformers, model_class)(config), folder)


def lora_layers(model: Any) -> dict[str, Any]:
    """Give PEFT's layers by the name that they have in the HF model."""
    return {
        name.removeprefix("base_model.model."): layer
        for name, layer in model.named_modules()
        if hasattr(layer, "lora_A")
    }
