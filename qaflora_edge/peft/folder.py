"""Read a PEFT folder: adapter_config.json beside adapter_model.safetensors. No torch is needed.

A folder of MLX is told by its config and read by `mlx`.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from qaflora_edge.errors import PeftConfigError, SafetensorsFileError, UnsupportedAdapterError
from qaflora_edge.files import AnyPath
from qaflora_edge.formats.safetensors import StoredTensor
from qaflora_edge.peft.config import CONFIG_FILE, PeftConfig, parse_config, read_fields
from qaflora_edge.peft.files import adapter_folder, read_weights
from qaflora_edge.peft.mlx import is_mlx, read_mlx
from qaflora_edge.peft.module import (
    PeftAdapter,
    PeftModule,
    check_matrix,
    check_pair,
    parameter_names,
)
from qaflora_edge.peft.refusals import tensor_kind

_PREFIX = "base_model.model."
# What torch.compile, DDP and FSDP put into the names of a model that is saved inside them.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# PEFT leaves out the adapter's name where it saves one adapter; a whole state has it in each key.
_LORA_NAME = re.compile(
    r"(?P<module>.+)\.(?:"
    r"lora_(?P<part>[AB])(?:\.weight|\.(?P<adapter>[^.]+)\.weight)?"
    r"|lora_embedding_(?P<embedding_part>[AB])(?:\.weight|\.(?P<embedding_adapter>[^.]+))?)"
)


def read_peft(folder: AnyPath) -> PeftAdapter:
    """Read and check a PEFT folder, or one of MLX.

    Raises InputFileError and its kinds when a file is missing or damaged,
    UnsupportedAdapterError when the adapter is more than a plain LoRA.
    """
    folder = adapter_folder(folder)
    fields = read_fields(folder)
    if is_mlx(fields):
        return read_mlx(folder, fields)
    config = parse_config(folder / CONFIG_FILE, fields)
    modules = _pair_tensors(folder, config, read_weights(folder))
    if config.ties_weights:
        _check_not_tied(config, modules)
    return PeftAdapter(folder, config, modules)


def module_name(name: str) -> str:
    """Strip what PEFT and other wrappers put before and into the name of a tensor."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    plain = ".".join(parts).removeprefix(f"module.{_PREFIX}").removeprefix(_PREFIX)
    return plain.removeprefix(_PREFIX)  # PEFT in PEFT, as some trainers save it


def _pair_tensors(
    folder: Path, config: PeftConfig, tensors: Mapping[str, StoredTensor]
) -> dict[str, PeftModule]:
    parts: dict[str, dict[str, StoredTensor]] = {}
    embeddings: set[str] = set()
    adapters: set[str] = set()
    copies: list[StoredTensor] = []
    for name, tensor in tensors.items():
        match = _LORA_NAME.fullmatch(module_name(name))
        if match is None:
            copies.append(tensor)
            continue
        adapters.add(match["adapter"] or match["embedding_adapter"] or "")
        _check_one_adapter(tensor, adapters)
        module, part = match["module"], match["part"] or match["embedding_part"]
        if part in parts.setdefault(module, {}):
            raise SafetensorsFileError(
                f"Cannot use {tensor.path}: module {module} has two tensors for lora_{part}; "
                "expected one. Save the adapter again."
            )
        parts[module][part] = tensor
        if match["embedding_part"]:
            embeddings.add(module)
    for tensor in copies:
        _check_copy(config, tensor, parts)
    if not parts:
        raise SafetensorsFileError(
            f"Cannot use the adapter {folder}: its weights hold no lora_A or lora_B; expected a "
            "trained LoRA. Save the adapter again."
        )
    config.check_work(parts)
    parameters = parameter_names(config, parts)
    modules = [
        _make_module(
            config, module, pair, parameters.get(module), is_embedding=module in embeddings
        )
        for module, pair in parts.items()
    ]
    return {module.name: module for module in modules}


def _check_one_adapter(tensor: StoredTensor, adapters: set[str]) -> None:
    if len(adapters) > 1:
        names = ", ".join(repr(name) if name else "one without a name" for name in sorted(adapters))
        raise UnsupportedAdapterError(
            f"Cannot use {tensor.path}: its tensors belong to several adapters, {names}; expected "
            "one. Load it with PEFT and save each with save_pretrained(selected_adapters=[...])."
        )


def _check_copy(config: PeftConfig, tensor: StoredTensor, parts: Mapping[str, object]) -> None:
    """Let pass the copies of the base's own tensors that PEFT saves beside LoRA on embeddings."""
    name = module_name(tensor.name)
    module, _, part = name.rpartition(".base_layer.")
    is_untrained = part == "weight" or (part == "bias" and config.bias == "none")
    if module in parts and is_untrained:
        return
    kind = tensor_kind(name)
    advice = "Train a plain LoRA, or merge the adapter into its base."
    if re.search(r"(^|\.)(embed_tokens|lm_head)(\.base_layer)?\.weight$", name):
        advice = (
            "PEFT saves these whole where the vocabulary was resized or an embedding is a target. "
            "If they were not trained, save the adapter again with "
            "save_pretrained(save_embedding_layers=False); else merge it into its base."
        )
    raise UnsupportedAdapterError(
        f"Cannot use {tensor.path}: tensor {tensor.name} is {kind}; expected only lora_A and "
        f"lora_B, for a plain LoRA cannot represent more. {advice}"
    )


def _make_module(
    config: PeftConfig,
    module: str,
    pair: Mapping[str, StoredTensor],
    parameter: str | None,
    *,
    is_embedding: bool,
) -> PeftModule:
    check_pair(module, pair, "AB")
    a, b = pair["A"], pair["B"]
    for tensor in (a, b):
        check_matrix(tensor)
    if parameter is None:
        config.check_target(module)
    key = parameter or module  # what PEFT's patterns are matched with
    rank = config.rank_of(key)
    is_stacked = parameter is not None and not parameter.endswith(".weight")
    n_expert = max(1, a.shape[0] // rank) if is_stacked else 0
    n_rank = rank * max(1, n_expert)
    if not a.shape[0] == b.shape[1] == n_rank:
        wanted = f"{rank} times the number of experts" if is_stacked else f"{rank}"
        raise PeftConfigError(
            f"Cannot use {config.path}: module {module} has rank {rank} by r and rank_pattern, but "
            f"lora_A is {list(a.shape)} and lora_B {list(b.shape)}; expected [{wanted}, n_in] and "
            f"[n_out, {wanted}]. The two files do not belong together; save the adapter again."
        )
    name, scale, n_in, n_out = module, config.scale_of(key), a.shape[1], b.shape[0]
    if is_stacked:
        name = key
    return PeftModule(name, rank, n_in, n_out, scale, a, b, is_embedding, n_expert=n_expert)


def _check_not_tied(config: PeftConfig, modules: Mapping[str, PeftModule]) -> None:
    for name, module in modules.items():
        if module.is_embedding or name.rpartition(".")[2] == "lm_head":
            raise UnsupportedAdapterError(
                f"Cannot use {config.path}: ensure_weight_tying is true and module {name} has a "
                "LoRA; one LoRA shared by embedding and head cannot be represented. Train without "
                "it, or leave these modules out."
            )
