"""Read an adapter of MLX: adapter_config.json beside adapters.safetensors.

Facts of ml-explore/mlx-lm d78bf58e: tuner/lora.py LoRALinear holds lora_a as [n_in, rank] and
lora_b as [rank, n_out], and adds lora_parameters.scale times their product, whatever the rank.
Modules carry the names of the HF model. A quantised base changes none of this.
LoRASwitchLinear, of a mixture's experts, holds lora_a as [n_expert, rank, n_in] and lora_b as
[n_expert, n_out, rank], under the name switch_mlp in place of HF's experts.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from qaflora_edge.errors import (
    InputFileError,
    PeftConfigError,
    SafetensorsFileError,
    UnsupportedAdapterError,
)
from qaflora_edge.formats.safetensors import StoredTensor, read_safetensors
from qaflora_edge.peft.config import (
    CONFIG_FILE,
    PeftConfig,
    check_alpha,
    check_name,
    check_names,
    check_rank,
    wrong_field,
)
from qaflora_edge.peft.module import PeftAdapter, PeftModule, check_matrix, check_pair
from qaflora_edge.peft.patterns import TargetRule
from qaflora_edge.peft.refusals import PLAIN, is_set, tensor_kind

WEIGHTS_FILE = "adapters.safetensors"
OLD_WEIGHTS_FILE = "adapters.npz"

# The last name of what MLX makes an Embedding of.
_EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings")
_EXPERTS = re.compile(r".+\.switch_mlp\.(gate|up|down)_proj")
_LORA_NAME = re.compile(r"(?P<module>.+)\.lora_(?P<part>[ab])")


def is_mlx(fields: Mapping[str, Any]) -> bool:
    """Tell by its fields whether an adapter_config.json is of MLX."""
    return "peft_type" not in fields and ("lora_parameters" in fields or "fine_tune_type" in fields)


def read_mlx(folder: Path, fields: Mapping[str, Any]) -> PeftAdapter:
    """Read and check an adapter of MLX.

    fields  what its adapter_config.json holds

    Raises InputFileError and its kinds when a file is missing or damaged,
    UnsupportedAdapterError when the adapter is more than a plain LoRA.
    """
    path = folder / CONFIG_FILE
    _check_plain(path, fields)
    parameters = fields.get("lora_parameters")
    if not isinstance(parameters, dict):
        raise wrong_field(path, "lora_parameters", parameters, "an object with rank and scale")
    rank = check_rank(path, "lora_parameters.rank", parameters.get("rank"))
    scale = check_alpha(path, "lora_parameters.scale", parameters.get("scale"))
    _check_old_alpha(path, fields, parameters, rank)
    keys = check_names(path, "lora_parameters.keys", parameters.get("keys"))
    config = PeftConfig(
        path=path,
        rank=rank,
        alpha=scale * rank,
        targets=TargetRule(targets=keys, fields="lora_parameters.keys"),
        base_name=check_name(path, "model", fields.get("model")),
    )
    pairs = _pair_tensors(folder, _read_weights(folder))
    config.check_work(pairs)
    modules = {name: _make_module(config, scale, name, pair) for name, pair in pairs.items()}
    return PeftAdapter(folder, config, modules)


def _check_plain(path: Path, fields: Mapping[str, Any]) -> None:
    kind = fields.get("fine_tune_type", "lora")
    if kind == "lora" and is_set(fields.get("use_dora")):
        kind = "dora"  # as versions before September 2024 wrote it
    reason = {
        "dora": "DoRA also rescales the base's weights",
        "full": "whole matrices were trained, which are not low-rank",
    }.get(kind if isinstance(kind, str) else "")
    if reason is not None:
        raise UnsupportedAdapterError(
            f"Cannot use {path}: fine_tune_type is {kind!r}; {reason}, and a plain LoRA cannot "
            "represent it. Fuse it into its base with mlx_lm.fuse, or train a plain LoRA."
        )
    if kind != "lora":
        raise wrong_field(path, "fine_tune_type", kind, "'lora'")


def _check_old_alpha(
    path: Path, fields: Mapping[str, Any], parameters: Mapping[str, Any], rank: int
) -> None:
    """Refuse a scale that depends on the version that trained the adapter.

    Before mlx-lm 57b16724, June 2024, the factor was scale * alpha / rank; later versions ignore
    alpha, but wrote their default of 16 until 191d81d1, April 2025. fine_tune_type tells them
    apart: it came in September 2024. A config with alpha and without it may be of either.
    """
    alpha = parameters.get("alpha")
    if "fine_tune_type" not in fields and alpha is not None and alpha != rank:
        raise PeftConfigError(
            f"Cannot use {path}: lora_parameters.alpha is {alpha!r} beside scale; MLX used it "
            f"until June 2024 and ignores it since, and without fine_tune_type the scale cannot be "
            f"known; expected none, or {rank} as the rank. Remove alpha if a later version trained "
            "the adapter; else multiply scale by alpha / rank and remove it."
        )


def _read_weights(folder: Path) -> dict[str, StoredTensor]:
    if (folder / WEIGHTS_FILE).is_file():
        return read_safetensors(folder / WEIGHTS_FILE)
    if (folder / OLD_WEIGHTS_FILE).is_file():
        raise InputFileError(
            f"Cannot read the adapter {folder}: it has {OLD_WEIGHTS_FILE}, the format of early "
            f"MLX; expected {WEIGHTS_FILE}. Load it with mlx.core.load and save it with "
            "mlx.core.save_safetensors."
        )
    raise InputFileError(
        f"Cannot read the adapter {folder}: {WEIGHTS_FILE} is missing, which belongs to an "
        f"{CONFIG_FILE} of MLX. Give the folder that mlx_lm.lora wrote."
    )


def _pair_tensors(
    folder: Path, tensors: Mapping[str, StoredTensor]
) -> dict[str, dict[str, StoredTensor]]:
    pairs: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in tensors.items():
        match = _LORA_NAME.fullmatch(name)
        if match is None:
            kind = "a DoRA magnitude vector" if name.endswith(".m") else tensor_kind(name)
            raise UnsupportedAdapterError(
                f"Cannot use {tensor.path}: tensor {name} is {kind}; expected only lora_a and "
                f"lora_b, for a plain LoRA cannot represent more. {PLAIN}"
            )
        if not (_EXPERTS.fullmatch(match["module"]) and len(tensor.shape) == 3):
            check_matrix(tensor)
        pairs.setdefault(match["module"], {})[match["part"]] = tensor
    if not pairs:
        raise SafetensorsFileError(
            f"Cannot use the adapter {folder}: its weights hold no lora_a or lora_b; expected a "
            "trained LoRA. Save the adapter again."
        )
    return pairs


def _make_module(
    config: PeftConfig, scale: float, name: str, pair: Mapping[str, StoredTensor]
) -> PeftModule:
    check_pair(name, pair, "ab")
    if name.rpartition(".")[2] in _EMBEDDINGS:
        raise UnsupportedAdapterError(
            f"Cannot use {pair['a'].path}: module {name} is an embedding with a LoRA, which MLX "
            "applies to a tied head as well; expected LoRA on linear layers. Train without it."
        )
    config.check_target(name)
    a, b = pair["a"], pair["b"]
    if _EXPERTS.fullmatch(name):
        return _make_experts(config, scale, name, a, b)
    if not a.shape[1] == b.shape[0] == config.rank:
        raise PeftConfigError(
            f"Cannot use {config.path}: module {name} has rank {config.rank} by lora_parameters, "
            f"but lora_a is {list(a.shape)} and lora_b {list(b.shape)}; expected "
            f"[n_in, {config.rank}] and [{config.rank}, n_out]. The two files do not belong "
            "together; save the adapter again."
        )
    return PeftModule(name, config.rank, a.shape[0], b.shape[1], scale, a, b, is_transposed=True)


def _make_experts(
    config: PeftConfig, scale: float, name: str, a: StoredTensor, b: StoredTensor
) -> PeftModule:
    rank = config.rank
    if not (len(a.shape) == len(b.shape) == 3 and a.shape[0] == b.shape[0] > 0) or not (
        a.shape[1] == b.shape[2] == rank and 0 not in (a.shape[2], b.shape[1])
    ):
        raise PeftConfigError(
            f"Cannot use {config.path}: experts {name} have rank {rank} by lora_parameters, but "
            f"lora_a is {list(a.shape)} and lora_b {list(b.shape)}; expected "
            f"[n_expert, {rank}, n_in] and [n_expert, n_out, {rank}]. The two files do not belong "
            "together; save the adapter again."
        )
    n_expert, n_in, n_out = a.shape[0], a.shape[2], b.shape[1]
    a, b = replace(a, shape=(n_expert * rank, n_in)), replace(b, shape=(n_expert * n_out, rank))
    return PeftModule(name, rank, n_in, n_out, scale, a, b, n_expert=n_expert, is_b_by_expert=True)
