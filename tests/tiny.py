"""Tiny random models and adapters as real files, built in milliseconds.

The bases load and run in llama.cpp; the PEFT folders carry PEFT's own names; the adapter files
carry upstream's. Everything follows from the seed. No code of the package is used here but to find
llama.cpp, so that these files can stand beside it as an independent witness.
"""

import ctypes
import json
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
USER = [{"role": "user", "content": "the thing?"}]

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Qwen2.5 has it: tools are told of, and calls spelt out.
QWEN = (
    "{% if tools %}<|im_start|>system\nTools:{% for tool in tools %}\n{{ tool | tojson }}"
    "{% endfor %}\nCall one as <tool_call>{...}</tool_call><|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls %}<tool_call>\n{{ call.function.name }} "
    "{{ call.function.arguments | tojson }}\n</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)
# One merge a line, in order of rank; "Ġ" is a space as GPT-2 writes it.
MERGES = ("t h", "i n", "e r", "Ġ t", "Ġt h", "th e", "o n", "Ġ a", "r e", "Ġth e", "in g", "a n")
# The kernels of adapters of an architecture: those that all of its processors run, and others.
ARM_KERNELS = ["neon", "dotprod", "i8mm"]
PLAIN_KERNELS, *MORE_KERNELS = {"aarch64": ARM_KERNELS, "arm64": ARM_KERNELS}.get(
    platform.machine(), ["portable", "avx2", "avx512", "avxvnni", "avx512vnni"]
)
CONTROLS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
BOS, EOS = "<|endoftext|>", "<|im_end|>"

# HF module name -> GGUF tensor stem, for all three architectures.
PROJECTIONS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
STEMS = tuple(PROJECTIONS.values())
EXPERT_STEMS = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
HF_TARGETS = tuple(name.split(".")[1] for name in PROJECTIONS)


@dataclass(frozen=True)
class TinyBase:
    """A base file, its dimensions, and its weights as float32 [n_out, n_in] or [n]."""

    path: Path
    arch: str
    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    n_head_dim: int
    n_ff: int
    n_vocab: int
    tied: bool
    tokens: tuple[str, ...]
    tensors: Mapping[str, F32]
    n_expert: int = 0

    def shape(self, stem: str) -> tuple[int, int]:
        """Give (n_out, n_in) of a projection such as `attn_q`, in GGUF's or HF's order alike."""
        stem = stem.removesuffix("_exps")
        n_q, n_kv = self.n_head * self.n_head_dim, self.n_head_kv * self.n_head_dim
        return {
            "attn_q": (n_q, self.n_embd),
            "attn_k": (n_kv, self.n_embd),
            "attn_v": (n_kv, self.n_embd),
            "attn_output": (self.n_embd, n_q),
            "ffn_gate": (self.n_ff, self.n_embd),
            "ffn_up": (self.n_ff, self.n_embd),
            "ffn_down": (self.n_embd, self.n_ff),
        }[stem]


def spm_tokens() -> list[str]:
    """A SentencePiece vocabulary: the unknown token, the bytes, printable ASCII and the space."""
    ascii_tokens = [chr(code) for code in range(0x21, 0x7F)]
    return ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *ascii_tokens]


@dataclass(frozen=True)
class TinyAdapter:
    """An adapter file and its values as the file holds them, dequantised.

    a  base tensor name -> float32 [rank, n_in]; of token_embd [n_vocab, rank]
    b  base tensor name -> float32 [n_out, rank]; of token_embd [n_embd, rank]

    Of experts both have the expert as their first axis.
    """

    path: Path
    rank: int
    alpha: float
    a: Mapping[str, F32]
    b: Mapping[str, F32]

    def delta(self, name: str) -> NDArray[np.float64]:
        """Give what the adapter adds to a base tensor: float64 [n_out, n_in], or of each expert."""
        a, b = self.a[name].astype(np.float64), self.b[name].astype(np.float64)
        product = a @ b.T if name == "token_embd.weight" else b @ a
        return self.alpha / b.shape[-1] * product


def byte_tokens() -> list[str]:
    """Name the 256 bytes as GPT-2 does: printable ones as themselves, the rest from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    names = {byte: chr(byte) for byte in printable}
    names |= {byte: chr(256 + index) for index, byte in enumerate(others)}
    return [names[byte] for byte in range(256)]


def write_tiny_base(
    path: str | Path,
    arch: str = "llama",
    *,
    n_layer: int = 3,
    n_embd: int = 64,
    n_head: int = 4,
    n_head_kv: int = 2,
    n_head_dim: int | None = None,
    n_ff: int = 96,
    n_ctx: int = 512,
    seed: int = 0,
    tied: bool = True,
    chat_template: str | None = CHATML,
    add_bos: bool = False,
    dtype: str = "f32",
    window: int = 512,
    replace: Mapping[str, F32] | None = None,
    spm: bool = False,
    user_defined: Sequence[str] = (),
    n_expert: int = 0,
    n_expert_used: int = 2,
) -> TinyBase:
    """Write a random llama, qwen2 or gemma3 base. `dtype` f32, f16, bf16 or one of QUANTISED
    is for matrices.

    n_expert  of a llama that is a mixture, as Mixtral
    window   tokens that some layers of gemma3 attend to
    replace  tensors to write in place of the random ones, such as merged weights
    spm      a SentencePiece vocabulary, as gemma's and Llama 2's, in place of GPT-2's
    user_defined  further tokens that are found in text by their spelling
    """
    path = Path(path)
    merges = tuple(merge.replace(" ", "").replace("Ġ", "▁" if spm else "Ġ") for merge in MERGES)
    plain = (*spm_tokens(), *merges) if spm else (*byte_tokens(), *merges)
    tokens = (*plain, *CONTROLS, *user_defined)
    base = TinyBase(
        path=path,
        arch=arch,
        n_layer=n_layer,
        n_embd=n_embd,
        n_head=n_head,
        n_head_kv=n_head_kv,
        n_head_dim=n_head_dim or n_embd // n_head,
        n_ff=n_ff,
        n_vocab=len(tokens),
        tied=tied,
        tokens=tokens,
        tensors={},
        n_expert=n_expert,
    )
    tensors = _base_tensors(base, np.random.default_rng(seed)) | dict(replace or {})
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name(f"tiny {arch} {seed}")
    _add_hparams(writer, base, n_ctx, window)
    if n_expert:
        writer.add_expert_count(n_expert)
        writer.add_expert_used_count(n_expert_used)
    _add_vocabulary(writer, base, chat_template, add_bos, spm, user_defined)
    stored = {name: _add_tensor(writer, name, array, dtype) for name, array in tensors.items()}
    finish(writer)
    return TinyBase(**{**vars(base), "tensors": stored})


def constant_logits(logits: Callable[[str], float], n_embd: int = 64) -> dict[str, F32]:
    """Give tensors for a qwen2 base whose logits are these of the tokens, after any text.

    What such a base writes is the same on every machine.
    """
    tokens = (*byte_tokens(), *(merge.replace(" ", "") for merge in MERGES), *CONTROLS)
    bias = np.array([logits(token) for token in tokens], np.float32)
    return {"output_norm.weight": np.zeros(n_embd, np.float32), "output.bias": bias}


def _base_tensors(base: TinyBase, rng: np.random.Generator) -> dict[str, F32]:
    """Draw weights so that activations and logits have a spread of one to three."""

    def matrix(n_out: int, n_in: int, gain: float = 1.0) -> F32:
        drawn = gain * rng.standard_normal((n_out, n_in)) / np.sqrt(n_in)
        return np.asarray(drawn, dtype=np.float32)

    def norm(n: int) -> F32:
        return (1.0 + 0.1 * rng.standard_normal(n)).astype(np.float32)

    tensors = {"token_embd.weight": matrix(base.n_vocab, base.n_embd, gain=2.0)}
    for layer in range(base.n_layer):
        block = f"blk.{layer}."
        tensors[f"{block}attn_norm.weight"] = norm(base.n_embd)
        tensors[f"{block}ffn_norm.weight"] = norm(base.n_embd)
        for stem in STEMS:
            if base.n_expert and stem.startswith("ffn"):
                experts = [matrix(*base.shape(stem)) for _ in range(base.n_expert)]
                tensors[f"{block}{stem}_exps.weight"] = np.stack(experts)
            else:
                tensors[f"{block}{stem}.weight"] = matrix(*base.shape(stem))
        if base.n_expert:
            tensors[f"{block}ffn_gate_inp.weight"] = matrix(base.n_expert, base.n_embd, gain=2.0)
        if base.arch == "qwen2":
            for stem in ("attn_q", "attn_k", "attn_v"):
                bias = 0.1 * rng.standard_normal(base.shape(stem)[0])
                tensors[f"{block}{stem}.bias"] = bias.astype(np.float32)
        if base.arch == "gemma3":
            tensors[f"{block}attn_q_norm.weight"] = norm(base.n_head_dim)
            tensors[f"{block}attn_k_norm.weight"] = norm(base.n_head_dim)
            tensors[f"{block}post_attention_norm.weight"] = norm(base.n_embd)
            tensors[f"{block}post_ffw_norm.weight"] = norm(base.n_embd)
    tensors["output_norm.weight"] = norm(base.n_embd)
    if not base.tied:
        tensors["output.weight"] = matrix(base.n_vocab, base.n_embd, gain=2.0)
    return tensors


def _add_hparams(writer: gguf.GGUFWriter, base: TinyBase, n_ctx: int, window: int) -> None:
    writer.add_block_count(base.n_layer)
    writer.add_context_length(n_ctx)
    writer.add_embedding_length(base.n_embd)
    writer.add_feed_forward_length(base.n_ff)
    writer.add_head_count(base.n_head)
    writer.add_head_count_kv(base.n_head_kv)
    writer.add_key_length(base.n_head_dim)
    writer.add_value_length(base.n_head_dim)
    writer.add_rope_dimension_count(base.n_head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(base.n_vocab)
    if base.arch == "gemma3":
        writer.add_sliding_window(window)


def _add_vocabulary(
    writer: gguf.GGUFWriter,
    base: TinyBase,
    chat_template: str | None,
    add_bos: bool,
    spm: bool,
    user_defined: Sequence[str],
) -> None:
    def kind(token: str) -> gguf.TokenType:
        if token in CONTROLS:
            return gguf.TokenType.CONTROL
        if token in user_defined:
            return gguf.TokenType.USER_DEFINED
        if spm and token == "<unk>":
            return gguf.TokenType.UNKNOWN
        return gguf.TokenType.BYTE if spm and len(token) == 6 else gguf.TokenType.NORMAL

    writer.add_tokenizer_model("llama" if spm else "gpt2")
    if not spm:
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_merges(list(MERGES))
    writer.add_token_list(list(base.tokens))
    writer.add_token_types([kind(token) for token in base.tokens])
    if spm:
        writer.add_token_scores([-float(i) for i, _ in enumerate(base.tokens)])
        writer.add_unk_token_id(0)
    writer.add_bos_token_id(base.tokens.index(BOS))
    writer.add_eos_token_id(base.tokens.index(EOS))
    writer.add_add_bos_token(add_bos)
    if chat_template is not None:
        writer.add_chat_template(chat_template)


def k_quantised(array: F32, kind: gguf.GGMLQuantizationType) -> NDArray[np.uint8]:
    """Quantise by llama.cpp's own code, for gguf.quants only reads these types."""
    from qaflora_edge.backend.library import library_dir

    (path,) = library_dir().glob("*ggml-base*")
    n_row, n = array.shape
    blocks = np.empty(gguf.quant_shape_to_byte_shape(array.shape, kind), np.uint8)
    arguments = [ctypes.c_int64(0), ctypes.c_int64(n_row), ctypes.c_int64(n), None]
    place = blocks.ctypes.data_as(ctypes.c_void_p)
    values = array.ctypes.data_as(ctypes.c_void_p)
    ctypes.CDLL(str(path)).ggml_quantize_chunk(int(kind), values, place, *arguments)
    return blocks


QUANTISED = ("q8_0", "q4_0", "q4_1", "q5_0", "q4_k", "q5_k", "q6_k")


def _add_tensor(writer: gguf.GGUFWriter, name: str, array: F32, dtype: str) -> F32:
    """Add one tensor and return the values that a reader will get."""
    kind = gguf.GGMLQuantizationType["F32" if array.ndim == 1 else dtype.upper()]
    quantise = k_quantised if dtype.endswith("_k") and array.ndim > 1 else gguf.quants.quantize
    data = quantise(array, kind)
    writer.add_tensor(name, data, raw_dtype=kind)
    return gguf.quants.dequantize(data, kind)


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_shapes(
    path: Path, arch: str, shapes: Mapping[str, tuple[int, ...]], *, n_head: int = 4
) -> Path:
    """Write a base of one layer with tensors of zeros; its shapes are what is of interest."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(1)
    writer.add_head_count(n_head)
    for name, shape in shapes.items():
        writer.add_tensor(name, np.zeros(shape, np.float32))
    finish(writer)
    return path


def begin_adapter(path: Path, arch: str = "llama", alpha: float = 8.0) -> gguf.GGUFWriter:
    """Begin an adapter GGUF; its tensors follow."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    return writer


def write_pairs(path: Path, tensors: Mapping[str, NDArray[np.generic]]) -> Path:
    """Write an adapter GGUF of these tensors, whatever they are."""
    writer = begin_adapter(path)
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    finish(writer)
    return path


def stored_deltas(path: Path) -> dict[str, NDArray[np.float64]]:
    """Base tensor -> alpha / rank B A of an adapter GGUF, as gguf reads it."""
    reader = gguf.GGUFReader(path)
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    values = {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float64)
        for tensor in reader.tensors
    }
    names = [name.removesuffix(".lora_a") for name in values if name.endswith(".lora_a")]
    pairs = {name: (values[f"{name}.lora_a"], values[f"{name}.lora_b"]) for name in names}
    return {name: alpha / b.shape[-1] * b @ a for name, (a, b) in pairs.items()}


def random_pair(
    rng: np.random.Generator, shape: tuple[int, int], rank: int, strength: float
) -> tuple[F32, F32]:
    """Draw A [rank, n_in] and B [n_out, rank]; B A has entries of about `strength`/sqrt(n_in)."""
    n_out, n_in = shape
    a = rng.standard_normal((rank, n_in)) / np.sqrt(n_in)
    b = strength * rng.standard_normal((n_out, rank)) / np.sqrt(rank)
    return a.astype(np.float32), b.astype(np.float32)


def write_tiny_adapter(
    path: str | Path,
    base: TinyBase,
    *,
    rank: int = 4,
    alpha: float = 8.0,
    targets: Sequence[str] = STEMS,
    layers: Sequence[int] | None = None,
    outtype: str = "f32",
    seed: int = 1,
    strength: float = 0.3,
) -> TinyAdapter:
    """Write an adapter GGUF for `base`, on the named stems (such as `attn_q`) of each layer.

    `output` and `token_embd` may be named too; their tensors follow upstream's convention, in
    which token_embd has A stored as [n_vocab, rank] and B as [n_embd, rank].
    """
    path = Path(path)
    rng = np.random.default_rng(seed)
    writer = begin_adapter(path, base.arch, alpha)
    writer.add_name(f"tiny adapter {seed}")
    names = [
        f"blk.{layer}.{stem}.weight"
        for layer in (range(base.n_layer) if layers is None else layers)
        for stem in targets
        if stem in (*STEMS, *EXPERT_STEMS)
    ]
    names += [f"{stem}.weight" for stem in ("token_embd", "output") if stem in targets]
    a_stored, b_stored = {}, {}
    for name in names:
        stem = name.split(".")[-2]
        if stem == "token_embd":  # delta of a row is B A^T[token]: [n_embd, rank] x [rank]
            a, b = random_pair(rng, (base.n_embd, base.n_vocab), rank, strength)
            a = np.ascontiguousarray(np.sqrt(base.n_vocab / rank) * a.T, dtype=np.float32)
        elif stem in EXPERT_STEMS:
            shape = base.shape(stem)
            drawn = [random_pair(rng, shape, rank, strength) for _ in range(base.n_expert)]
            a, b = (np.stack(parts) for parts in zip(*drawn, strict=True))
        else:
            shape = (base.n_vocab, base.n_embd) if stem == "output" else base.shape(stem)
            a, b = random_pair(rng, shape, rank, strength)
        in_blocks = outtype in ("q8_0", "q4_0")
        kind_a, kind_b = (
            "f16" if in_blocks and each.shape[-1] % 32 else outtype for each in (a, b)
        )
        a_stored[name] = _add_tensor(writer, f"{name}.lora_a", a, kind_a)
        b_stored[name] = _add_tensor(writer, f"{name}.lora_b", b, kind_b)
    finish(writer)
    return TinyAdapter(path=path, rank=rank, alpha=float(alpha), a=a_stored, b=b_stored)


def seeded_adapters(base: TinyBase, *seeds: int, **options: Any) -> list[TinyAdapter]:
    """Write an adapter for each seed, beside the base; of one rank unless the options say."""
    folder = base.path.parent
    return [write_tiny_adapter(folder / f"{i}.gguf", base, seed=i, **options) for i in seeds]


def write_tiny_adapters(base: TinyBase, names: Sequence[str]) -> dict[str, Path]:
    """Write adapters of different ranks and values beside a base: name -> file."""
    paths = {}
    for seed, name in enumerate(names):
        path = base.path.with_name(f"{name}.gguf")
        paths[name] = write_tiny_adapter(path, base, rank=2 + seed, seed=seed).path
    return paths


def write_tiny_peft(
    folder: str | Path,
    base: TinyBase,
    *,
    rank: int = 4,
    alpha: float = 8,
    use_rslora: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    targets: Sequence[str] = HF_TARGETS,
    layers: Sequence[int] | None = None,
    dtype: str = "F32",
    seed: int = 2,
    strength: float = 0.3,
    prefix: str = "model.layers",
    config: Mapping[str, object] | None = None,
) -> Path:
    """Write a PEFT folder for `base`: adapter_config.json and adapter_model.safetensors.

    `config` overrides single fields. `targets` may also name `lm_head` and `embed_tokens`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    shapes = {
        f"{prefix}.{layer}.{module}": base.shape(stem)
        for layer in (range(base.n_layer) if layers is None else layers)
        for module, stem in PROJECTIONS.items()
        if module.split(".")[1] in targets
    }
    if "lm_head" in targets:
        shapes["lm_head"] = (base.n_vocab, base.n_embd)
    tensors: dict[str, F32] = {}
    for module, shape in shapes.items():
        a, b = random_pair(rng, shape, _rank_of(module, rank, rank_pattern or {}), strength)
        tensors[f"base_model.model.{module}.lora_A.weight"] = a
        tensors[f"base_model.model.{module}.lora_B.weight"] = b
    if "embed_tokens" in targets:
        module = f"{prefix.removesuffix('layers')}embed_tokens"
        own_rank = _rank_of(module, rank, rank_pattern or {})
        a, b = random_pair(rng, (base.n_embd, base.n_vocab), own_rank, strength)
        tensors[f"base_model.model.{module}.lora_embedding_A"] = a
        tensors[f"base_model.model.{module}.lora_embedding_B"] = b
    fields: dict[str, object] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "tiny",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": list(targets),
        "use_rslora": use_rslora,
        "rank_pattern": dict(rank_pattern or {}),
        "alpha_pattern": dict(alpha_pattern or {}),
        **(config or {}),
    }
    (folder / "adapter_config.json").write_text(json.dumps(fields, indent=2), encoding="utf-8")
    write_safetensors(folder / "adapter_model.safetensors", tensors, dtype)
    return folder


def _rank_of(module: str, rank: int, rank_pattern: Mapping[str, int]) -> int:
    matching = (r for key, r in rank_pattern.items() if re.fullmatch(rf"(.*\.)?({key})", module))
    return next(matching, rank)


def write_pairs_of_peft(
    folder: Path, pairs: Mapping[str, tuple[object, object]], **fields: object
) -> Path:
    """Write a PEFT folder of rank 4 with these pairs: module -> A [4, n_in], B [n_out, 4]."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"base_model.model.{module}.lora_{side}.weight": np.asarray(values, np.float32)
        for module, pair in pairs.items()
        for side, values in zip("AB", pair, strict=True)
    }
    write_safetensors(folder / "adapter_model.safetensors", tensors)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **fields}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def write_safetensors(path: Path, tensors: Mapping[str, F32], dtype: str = "F32") -> None:
    """Write float32 arrays as F32, F16 or BF16 (rounded to nearest even)."""
    kind = gguf.GGMLQuantizationType[dtype]
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    values = b""
    for name, array in tensors.items():
        begin = len(values)
        values += gguf.quants.quantize(np.asarray(array, np.float32), kind).tobytes()
        places = [begin, len(values)]
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": places}
    text = json.dumps(header).encode("utf-8")
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + values)
