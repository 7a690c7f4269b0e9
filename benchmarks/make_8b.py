"""Make a base of Llama 3 8B's shape with random weights, and adapters for it, to measure speed.

    python benchmarks/make_8b.py FOLDER [--adapters 8]
    qaflora bench FOLDER/base.gguf --only decode --k 3,8 --adapter FOLDER/adapter-0.gguf ...

FOLDER/base.gguf has 5 GB in the layout of Q4_K_M, and the vocabulary of Qwen2.5-Coder-0.5B. Its
answers are noise.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from qaflora_edge.formats.names import find_model, local_path

VOCABULARY = "qwen2.5-coder-0.5b-instruct"
N_LAYER, N_EMBD, N_KV, N_FF = 32, 4096, 1024, 14336
SHAPES = {  # stem -> [n_out, n_in]
    "attn_q": (N_EMBD, N_EMBD),
    "attn_k": (N_KV, N_EMBD),
    "attn_v": (N_KV, N_EMBD),
    "attn_output": (N_EMBD, N_EMBD),
    "ffn_gate": (N_FF, N_EMBD),
    "ffn_up": (N_FF, N_EMBD),
    "ffn_down": (N_EMBD, N_FF),
}
N_DISTINCT = 4096  # blocks of 256 weights, which tensors repeat at random


@dataclass(frozen=True)
class Tensor:
    """One tensor of the base: its shape as numpy orders it, and how it is stored."""

    name: str
    shape: tuple[int, ...]
    type: Type

    @property
    def row_bytes(self) -> int:
        """What a row takes."""
        block_size, block_bytes = gguf.GGML_QUANT_SIZES[self.type]
        return self.shape[-1] // block_size * block_bytes


def tensors(n_vocab: int) -> Iterator[Tensor]:
    """Give the tensors in their order; llama.cpp 0c1e5709, use_more_bits: which are of 6 bits."""
    yield Tensor("token_embd.weight", (n_vocab, N_EMBD), Type.Q4_K)
    yield Tensor("output.weight", (n_vocab, N_EMBD), Type.Q6_K)
    yield Tensor("output_norm.weight", (N_EMBD,), Type.F32)
    eighth = N_LAYER // 8
    for layer in range(N_LAYER):
        is_outer = layer < eighth or layer >= 7 * eighth
        has_more = is_outer or (layer - eighth) % 3 == 2
        for stem, shape in SHAPES.items():
            is_fine = has_more and stem in ("attn_v", "ffn_down")
            kind = Type.Q6_K if is_fine else Type.Q4_K
            yield Tensor(f"blk.{layer}.{stem}.weight", shape, kind)
        for stem in ("attn_norm", "ffn_norm"):
            yield Tensor(f"blk.{layer}.{stem}.weight", (N_EMBD,), Type.F32)


def random_blocks(kind: Type, rng: np.random.Generator) -> Any:
    """Give blocks of about zero mean: uint8 [N_DISTINCT, bytes of a block]."""
    n_bytes = gguf.GGML_QUANT_SIZES[kind][1]
    blocks = rng.integers(0, 256, (N_DISTINCT, n_bytes), np.uint8)
    scales = blocks.view(np.float16)
    if kind == Type.Q4_K:
        scales[:, 0] = 1.4e-4
        scales[:, 1] = 1.05e-3  # of minima
    else:
        scales[:, -1] = 3e-5
    return blocks


def add_vocabulary(writer: gguf.GGUFWriter, source: Path) -> int:
    """Copy the tokenizer's fields and return the number of tokens."""
    fields = gguf.GGUFReader(source).fields
    for name, field in fields.items():
        if name.startswith("tokenizer."):
            kind, *inner = field.types
            writer.add_key_value(name, field.contents(), kind, inner[0] if inner else None)
    return len(fields["tokenizer.ggml.tokens"].data)


def write_base(path: Path, vocabulary: Path) -> None:
    """Write the base, with one tensor in memory at a time."""
    rng = np.random.default_rng(0)
    blocks = {kind: random_blocks(kind, rng) for kind in (Type.Q4_K, Type.Q6_K)}
    writer = gguf.GGUFWriter(path, "llama")
    n_vocab = add_vocabulary(writer, vocabulary)
    writer.add_name("Random 8B")
    writer.add_vocab_size(n_vocab)
    writer.add_block_count(N_LAYER)
    writer.add_context_length(8192)
    writer.add_embedding_length(N_EMBD)
    writer.add_feed_forward_length(N_FF)
    writer.add_head_count(32)
    writer.add_head_count_kv(8)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(128)
    writer.add_rope_freq_base(500000.0)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_K_M)
    every = list(tensors(n_vocab))
    for tensor in every:
        n_bytes = tensor.row_bytes * (tensor.shape[0] if len(tensor.shape) > 1 else 1)
        dtype = np.dtype(np.float32)
        writer.add_tensor_info(tensor.name, tensor.shape, dtype, n_bytes, tensor.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in every:
        if tensor.type == Type.F32:
            writer.write_tensor_data(np.ones(tensor.shape, np.float32))
            continue
        n_block = tensor.shape[0] * tensor.shape[1] // 256
        writer.write_tensor_data(blocks[tensor.type][rng.integers(0, N_DISTINCT, n_block)])
    writer.close()


def write_adapter(path: Path, rank: int, seed: int) -> None:
    """Write an adapter of all projections in F16."""
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 2 * rank)
    for layer in range(N_LAYER):
        for stem, (n_out, n_in) in SHAPES.items():
            for side, shape in (("a", (rank, n_in)), ("b", (n_out, rank))):
                values = rng.standard_normal(shape, np.float32) / 64
                name = f"blk.{layer}.{stem}.weight.lora_{side}"
                writer.add_tensor(name, values.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    """Write what is missing in FOLDER."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--adapters", type=int, default=8, metavar="N")
    parser.add_argument("--rank", type=int, default=16)
    args = parser.parse_args()
    vocabulary = local_path(find_model(VOCABULARY))
    if vocabulary is None:
        parser.error(f"the vocabulary is that of {VOCABULARY}: `qaflora pull {VOCABULARY}` first")
    args.folder.mkdir(parents=True, exist_ok=True)
    write_base(args.folder / "base.gguf", vocabulary)
    for index in range(args.adapters):
        write_adapter(args.folder / f"adapter-{index}.gguf", args.rank, index)


if __name__ == "__main__":
    main()
