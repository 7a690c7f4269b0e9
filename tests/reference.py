"""The method written once more on transformers and PEFT, sharing no code with the package.

The base is the GGUF's own weights, dequantised by transformers; adapters are PEFT folders.
"""

import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import F32, F64
from transformers import AutoModelForCausalLM, GgufConfig

HF_MODULES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def dequantise(source: Path, target: Path) -> Path:
    """Copy a GGUF with every tensor as F32; the vocabulary and all fields stay."""
    reader = gguf.GGUFReader(source)
    arch = str(reader.fields["general.architecture"].contents())
    writer = gguf.GGUFWriter(target, arch)
    for field in reader.fields.values():
        skip = field.name.startswith("GGUF.") or field.name == "general.architecture"
        if not skip:
            kinds = field.types
            sub_type = kinds[-1] if kinds[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), kinds[0], sub_type=sub_type)
    for tensor in reader.tensors:
        array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        shape = tuple(int(n) for n in reversed(tensor.shape))
        writer.add_tensor(tensor.name, array.astype(np.float32).reshape(shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def peft_from_gguf(adapter: Path, folder: Path, n_head: int, n_head_kv: int) -> Path:
    """A PEFT folder with the values of an adapter GGUF of the llama architecture."""
    reader = gguf.GGUFReader(adapter)
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    tensors, rank = {}, 0
    for tensor in reader.tensors:
        _, layer, stem, _, part = tensor.name.split(".")
        array = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if part == "lora_b" and stem in ("attn_q", "attn_k"):
            array = _unpermute(array, n_head if stem == "attn_q" else n_head_kv)
        rank = array.shape[1] if part == "lora_b" else rank
        name = f"model.layers.{layer}.{HF_MODULES[stem]}.lora_{part[-1].upper()}.weight"
        tensors[f"base_model.model.{name}"] = torch.from_numpy(np.ascontiguousarray(array))
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "base",
        "r": rank,
        "lora_alpha": alpha,
        "bias": "none",
        "target_modules": [name.split(".")[1] for name in HF_MODULES.values()],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def _unpermute(rows: F32, n_head: int) -> F32:
    """From llama.cpp's order of a head's rows (interleaved pairs) to the two halves of HF's."""
    n_row = rows.shape[0]
    paired = rows.reshape(n_head, n_row // n_head // 2, 2, -1)
    return paired.swapaxes(1, 2).reshape(rows.shape)


class Reference:
    """A dequantised base with PEFT adapters, float32 on the CPU.

    adapters  name -> PEFT folder
    """

    def __init__(self, base: Path, adapters: dict[str, Path]) -> None:
        model = AutoModelForCausalLM.from_pretrained(
            base.parent,
            gguf_file=base.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
            attn_implementation="eager",
        )
        self.adapters = adapters
        for i, (name, folder) in enumerate(adapters.items()):
            if i == 0:
                self.model = PeftModel.from_pretrained(model, folder, adapter_name=name)
            else:
                self.model.load_adapter(folder, adapter_name=name)
        self.model.eval()
        self.causal = self.model.base_model.model
        self.layers = self.causal.model.layers
        self.head = self.causal.lm_head.weight.detach().double()
        self._states: dict[tuple[tuple[int, ...], str | None], tuple[F64, F32]] = {}

    def states(self, tokens: Sequence[int], adapter: str | None) -> tuple[F64, F32]:
        """States of the last token after each block [n_layer, n_embd], and logits [n_vocab].

        What was computed once is kept: tests ask for the same prompts.
        """
        if (tuple(tokens), adapter) not in self._states:
            self.read([tokens])
        return self._states[tuple(tokens), adapter]

    @torch.inference_mode()
    def read(self, prompts: Sequence[Sequence[int]]) -> None:
        """Compute the states of prompts; to change adapters takes PEFT longer than a pass."""
        for adapter in (None, *self.adapters):
            if adapter is not None:
                self.model.set_adapter(adapter)
            with self.model.disable_adapter() if adapter is None else nullcontext():
                for tokens in prompts:
                    self._states[tuple(tokens), adapter] = self._compute_states(tokens)

    def _compute_states(self, tokens: Sequence[int]) -> tuple[F64, F32]:
        kept: list[torch.Tensor] = []
        hooks = [
            layer.register_forward_hook(
                lambda _module, _inputs, output: kept.append(
                    (output[0] if isinstance(output, tuple) else output)[0, -1]
                )
            )
            for layer in self.layers
        ]
        try:
            logits = self.model(input_ids=torch.tensor([list(tokens)])).logits[0, -1]
        finally:
            for hook in hooks:
                hook.remove()
        return torch.stack(kept).double().numpy(), logits.numpy()

    def weights(self, tokens: Sequence[int], lens: str) -> F64:
        """Weights [n_adapter, n_layer], in float64 from float32 states."""
        by_adapter = [self.states(tokens, name)[0] for name in (None, *self.adapters)]
        states = torch.from_numpy(np.stack(by_adapter))  # [1 + n_adapter, n_layer, n_embd]
        norm = self.causal.model.norm
        rms = states.square().mean(dim=-1, keepdim=True).add(norm.variance_epsilon).sqrt()
        normed = norm.weight.detach().double() * states / rms
        seen = normed if lens == "norm" else torch.cat([states[:, :-1], normed[:, -1:]], dim=1)
        logits = seen @ self.head.T  # [1 + n_adapter, n_layer, n_vocab]
        p = logits[0].softmax(dim=-1)
        # KL = log sum p e^d - sum p d, for d shifted so that it is 0 at the likeliest token
        d = logits[1:] - logits[0]
        likeliest = p.argmax(dim=-1, keepdim=True).expand(len(d), -1, -1)
        d -= d.gather(-1, likeliest)
        divergences = (p * d.expm1()).sum(dim=-1).log1p() - (p * d).sum(dim=-1)
        divergences.clamp_(min=0.0)
        return (divergences / divergences.sum(dim=0, keepdim=True)).numpy()

    @torch.inference_mode()
    def logits(
        self,
        pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
        weights: NDArray[np.floating],
        *,
        n_tail: int = 0,
    ) -> list[F32]:
        """The logits after a prompt and after each token of its answer, in one pass for each pair.

        weights  [n_adapter, n_layer], merged into the base
        n_tail   tokens of a prompt that are read then, and all before them earlier; 0: all of it
        returns  of each pair [1 + len(answer), n_vocab]
        """
        n_base = [len(tokens) - n_tail if n_tail else 0 for tokens, _ in pairs]
        with self.model.disable_adapter():
            states = [
                self.causal(input_ids=torch.tensor([tokens[:n]])).past_key_values if n else None
                for (tokens, _), n in zip(pairs, n_base, strict=True)
            ]
        undo = self._merge(weights)
        try:
            with self.model.disable_adapter():
                return [
                    self.causal(
                        input_ids=torch.tensor([[*tokens[n:], *answer]]), past_key_values=state
                    )
                    .logits[0, len(tokens) - 1 - n :]
                    .numpy()
                    for (tokens, answer), n, state in zip(pairs, n_base, states, strict=True)
                ]
        finally:
            for parameter, original in undo:
                parameter.copy_(original)

    def _merge(
        self, weights: NDArray[np.floating]
    ) -> list[tuple[torch.nn.Parameter, torch.Tensor]]:
        undo = []
        scaled = [
            (load_file(folder / "adapter_model.safetensors"), config["lora_alpha"] / config["r"])
            for folder in self.adapters.values()
            for config in [json.loads((folder / "adapter_config.json").read_text())]
        ]
        for il, layer in enumerate(self.layers):
            for module in HF_MODULES.values():
                key = f"base_model.model.model.layers.{il}.{module}.lora_"
                a = torch.cat([tensors[f"{key}A.weight"] for tensors, _ in scaled])
                b = [
                    float(weights[ia, il]) * scale * tensors[f"{key}B.weight"].double()
                    for ia, (tensors, scale) in enumerate(scaled)
                ]
                parameter = layer.get_submodule(module).base_layer.weight
                undo.append((parameter, parameter.detach().clone()))
                parameter += (torch.cat(b, dim=1) @ a.double()).float()
        return undo
