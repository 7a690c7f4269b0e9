"""The architectures of llama.cpp that adapters are not converted for, and why. No I/O.

The tests compare this list with llama.cpp 0c1e5709, src/llama-arch.cpp, so that each of its
architectures is either reviewed (`architectures`) or here; and with docs/convert.md.
"""

from collections.abc import Mapping

_ENCODER = "it is an encoder, which generates no text"
_SPEECH = "it makes speech"
_DRAFT = "it drafts for another model, and is no language model by itself"
_DIFFUSION = "it generates by diffusion, not token by token"
_LATENT = "llama.cpp multiplies with its latent attention's matrices without adapters"
_LINEAR = "llama.cpp multiplies with its linear attention's matrices without adapters"
_UNNAMED = "no gguf package that was released names its tensors"
_FOLDED = "multipliers that the GGUF does not hold are folded into its weights"
_UNTRIED = "it was not tried against a reference"
_UNPROVEN = "the base did not match transformers in our trials, so that nothing is proven"

REASONS: Mapping[str, tuple[str, ...]] = {
    _ENCODER: (
        *("bert", "eurobert", "gemma-embedding", "jina-bert-v2", "jina-bert-v3", "llama-embed"),
        *("modern-bert", "neo-bert", "nomic-bert", "nomic-bert-moe", "t5encoder"),
    ),
    "it has an encoder beside its decoder": ("t5",),
    _SPEECH: ("pockettts", "qwen3tts", "wavtokenizer-dec"),
    "it is no language model, but a model of images": ("clip",),
    _DRAFT: ("dflash", "eagle3", "gemma4-assistant"),
    _DIFFUSION: ("dream", "llada", "llada-moe", "rnd1"),
    _LATENT: (
        *("deepseek2", "deepseek2-ocr", "deepseek32", "deepseek4", "dots3note", "glm-dsa"),
        *("hy_v4", "minicpm3", "mistral4", "plm"),
    ),
    _LINEAR: (
        *("arwkv7", "bailingmoe3", "glm5-next", "kimi-k3", "kimi-linear", "rwkv6", "rwkv6qwen2"),
        "rwkv7",
    ),
    "it holds adapters of its own, which llama.cpp chooses from": ("graniteswitch",),
    "llama.cpp names it and cannot run it": ("gptj",),
    "llama.cpp does not show its blocks' outputs, which weighing needs": ("plamo2",),
    "its blocks differ in their counts of heads": ("deci",),
    "its weights are ternary, and rounded anew whenever they are converted": ("bitnet",),
    _FOLDED: ("falcon-h1", "jais"),
    "llama.cpp's converter stops at it, so that there is nothing to compare with": ("baichuan",),
    "llama.cpp's converter knows one size of it, too large to be tried": ("plamo",),
    _UNNAMED: (
        *("cohere2moe", "granite_swa", "hrm_text", "hy_v3", "laguna", "maple", "mellum"),
        *("minimax-01", "minimax-m3", "muse-glimmer", "nanbeige", "qwen4exp", "spark2_5", "talkie"),
    ),
    "its blocks pass on four streams, of which none is the state that weighing reads": ("gemma3n",),
    _UNPROVEN: ("phimoe",),
    _UNTRIED: (
        *("arctic", "bailingmoe2", "chameleon", "cogvlm", "grok", "grovemoe", "hunyuan_vl"),
        *("llama4", "mimo2", "nemotron_h", "nemotron_h_moe", "qwen3vlmoe", "smallthinker"),
        "step35",
    ),
}
# general.architecture -> why adapters of it are refused
REFUSED: Mapping[str, str] = {name: why for why, names in REASONS.items() for name in names}
