"""Features of PEFT that a plain LoRA cannot represent, each by its own name."""

import re
from collections.abc import Mapping

PLAIN = "Train a plain LoRA."
MERGE = "Merge the adapter into its base, or train a plain LoRA."


def is_set(value: object) -> bool:
    """Tell whether a field asks for something."""
    return value not in (None, False, "", [], {})


# field -> (why it cannot be represented, what to do)
FIELDS: Mapping[str, tuple[str, str]] = {
    "use_dora": ("DoRA also rescales the base's weights", MERGE),
    "lora_bias": ("a bias on B is not low-rank", "Train with lora_bias=False."),
    "modules_to_save": (
        "these modules were trained whole and are not low-rank",
        "Train them with LoRA (target_modules) or leave them out.",
    ),
    "layer_replication": (
        "the adapter is for a base with repeated layers",
        "Use an adapter that was trained on the base as it is.",
    ),
    "trainable_token_indices": (
        "single trained token embeddings are not low-rank",
        "Train without it, or merge the adapter into its base.",
    ),
    "alora_invocation_tokens": ("an activated LoRA acts only after certain tokens", PLAIN),
    "megatron_config": (
        "Megatron's parallel layers are split over devices",
        "Save the adapter from unsplit layers.",
    ),
    "use_qalora": ("QA-LoRA pools its input in groups", PLAIN),
    "use_bdlora": ("block-diagonal LoRA is stored in blocks", PLAIN),
    "arrow_config": ("Arrow routes between other adapters", "Give those adapters."),
    "kasa_config": ("KaSA also truncates the base's weights", MERGE),
    "monteclora_config": ("MonteCLoRA samples its weights", PLAIN),
}

# The kinds of adapter of PEFT 0.21, peft/utils/peft_types.py, that are no LoRA.
_PROMPTS = ("it trains a prompt and no weights", PLAIN)
_MIXTURE = ("it routes between several LoRAs", "Give those LoRAs, one by one.")
_DELTA = (
    "its change of the weights is no product of two small matrices",
    "Merge it into its base, train a plain LoRA, or approximate it with PEFT's save_as_lora.",
)
_OTHER = ("only LoRA can be represented", MERGE)
TYPES: Mapping[str, tuple[str, str]] = {
    **dict.fromkeys(
        ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"), _PROMPTS
    ),
    **dict.fromkeys(("CPT", "CARTRIDGE", "ADAPTION_PROMPT"), _PROMPTS),
    **dict.fromkeys(("XLORA", "POLY"), _MIXTURE),
    **dict.fromkeys(("LOHA", "LOKR", "FOURIERFT", "SHIRA", "C3A", "WAVEFT"), _DELTA),
    "ADALORA": ("its singular values stand between A and B", MERGE),
    "VERA": ("it scales random matrices that the base's layers share", MERGE),
    "IA3": ("it rescales activations", MERGE),
    "OFT": ("it rotates the base's weights", MERGE),
    "BOFT": ("it rotates the base's weights", MERGE),
    "LN_TUNING": ("it trains norms, which are not low-rank", MERGE),
    "TRAINABLE_TOKENS": ("single trained token embeddings are not low-rank", MERGE),
}


def type_refusal(kind: str) -> tuple[str, str]:
    """Say why an adapter of another kind than LoRA cannot be used, and what to do."""
    return TYPES.get(kind.upper(), _OTHER)


# Tensors that are no lora_A or lora_B: a pattern of the name -> what it is. The first one counts.
_TENSORS: Mapping[str, str] = {
    r"\.lora_magnitude_vector(\.[^.]+)?(\.weight)?$": "a DoRA magnitude vector",
    r"\.modules_to_save\.": "a module that was trained whole",
    r"\.trainable_tokens_(delta|original)(\.|$)": "single trained token embeddings",
    r"\.lora_E(\.|$)": "AdaLoRA's singular values",
    r"\.lora_diag(\.|$)": "KaSA's singular values",
    r"\.hada_w": "a part of LoHa",
    r"\.lokr_": "a part of LoKr",
    r"\.ia3_l": "a part of IA3",
    r"\.?vera_": "a part of VeRA",
    r"\.b?oft_": "a part of OFT",
    r"(^|\.)prompt_(embeddings|encoder)": "a trained prompt",
    r"\.bias$": "a bias",
    r"(norm[^.]*|\.ln_[^.]+)\.weight$": "a norm's weight",
    r"\.weight$": "a whole weight matrix",
}


def tensor_kind(name: str) -> str:
    """Say what a tensor is that belongs to no plain LoRA."""
    return next((kind for end, kind in _TENSORS.items() if re.search(end, name)), "not known here")
