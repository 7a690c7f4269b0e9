"""Read a PEFT folder: adapter_config.json beside adapter_model.safetensors. No torch is needed."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from qaflora_edge.errors import (
    InputFileError,
    PeftConfigError,
    SafetensorsFileError,
    UnsupportedAdapterError,
)
from qaflora_edge.files import open_input
from qaflora_edge.json_text import read_json_object
from qaflora_edge.peft_config import CONFIG_FILE, PeftConfig, read_peft_config
from qaflora_edge.safetensors_file import F32, StoredTensor, read_safetensors

WEIGHTS_FILE = "adapter_model.safetensors"
INDEX_FILE = "adapter_model.safetensors.index.json"
PICKLE_FILE = "adapter_model.bin"
MAX_INDEX_BYTES = 1 << 24
MAX_SHARDS = 1000

_PREFIX = "base_model.model."
_LORA_NAME = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<part>[AB])(\.weight)?")
# Tensors of known features, refused by name: end of the tensor's name -> the feature.
_FOREIGN = {
    ".lora_magnitude_vector": "a DoRA magnitude vector",
    ".lora_magnitude_vector.weight": "a DoRA magnitude vector",
    ".lora_A.bias": "a bias",
    ".lora_B.bias": "a bias",
    ".bias": "a bias",
    "norm.weight": "a norm's weight",
    ".trainable_tokens_delta": "single trained token embeddings",
    ".lora_E": "AdaLoRA's singular values",
    ".lora_diag": "KaSA's singular values",
    ".weight": "a whole weight matrix",
}


@dataclass(frozen=True)
class PeftModule:
    """One projection of an adapter; its delta to the base's weight is scale * B A.

    For an embedding n_in is the vocabulary and the delta is transposed, as in PEFT.
    """

    name: str
    rank: int
    n_in: int
    n_out: int
    scale: float
    is_embedding: bool
    a: StoredTensor
    b: StoredTensor

    def read_a(self, *, transposed: bool = False) -> F32:
        """returns  [rank, n_in], transposed [n_in, rank]  float32, finite"""
        return self.a.read(transposed=transposed)

    def read_b(self) -> F32:
        """returns  [n_out, rank]  float32, finite"""
        return self.b.read()


@dataclass(frozen=True)
class PeftAdapter:
    """A checked PEFT folder; the values are read when asked for."""

    folder: Path
    config: PeftConfig
    modules: Mapping[str, PeftModule]


def read_peft(folder: str | os.PathLike[str]) -> PeftAdapter:
    """Read and check a PEFT folder.

    Raises InputFileError and its kinds when a file is missing or damaged,
    UnsupportedAdapterError when the adapter is more than a plain LoRA.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise InputFileError(
            f"Cannot read the adapter {folder}: it {what}; expected a PEFT folder with "
            f"{CONFIG_FILE} and {WEIGHTS_FILE}. Check the path."
        )
    config = read_peft_config(folder)
    tensors = _read_weights(folder)
    modules = _pair_tensors(folder, config, tensors)
    if config.ties_weights:
        _check_not_tied(config, modules)
    return PeftAdapter(folder, config, modules)


def _read_weights(folder: Path) -> dict[str, StoredTensor]:
    if (folder / WEIGHTS_FILE).is_file():
        return read_safetensors(folder / WEIGHTS_FILE)
    if (folder / INDEX_FILE).is_file():
        return _read_shards(folder)
    if (folder / PICKLE_FILE).is_file():
        raise InputFileError(
            f"Cannot read the adapter {folder}: it has {PICKLE_FILE}, and pickles are not opened "
            f"because they can run code; expected {WEIGHTS_FILE}. Load it with PEFT and save it "
            "with save_pretrained(..., safe_serialization=True)."
        )
    raise InputFileError(
        f"Cannot read the adapter {folder}: {WEIGHTS_FILE} is missing. "
        "Give the folder that PEFT's save_pretrained wrote."
    )


def _read_shards(folder: Path) -> dict[str, StoredTensor]:
    path = folder / INDEX_FILE
    weight_map = _read_weight_map(path)
    files = sorted(set(weight_map.values()))
    if len(files) > MAX_SHARDS:
        _fail_index(path, "the number of files", str(len(files)), f"at most {MAX_SHARDS}")
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors", file):
            _fail_index(path, "a file in weight_map", repr(file), "a .safetensors file beside it")
        for name, tensor in read_safetensors(folder / file).items():
            if weight_map.get(name) != file:
                found = f"in {file}"
                _fail_index(path, f"tensor {name}", found, f"in {weight_map.get(name, 'no file')}")
            tensors[name] = tensor
    for name, file in weight_map.items():
        if name not in tensors:
            _fail_index(path, f"tensor {name}", "missing", f"in {file}")
    return tensors


def _read_weight_map(path: Path) -> dict[str, str]:
    try:
        with open_input(path) as file:
            data = file.read(MAX_INDEX_BYTES + 1)
    except OSError as error:
        raise InputFileError(f"Cannot read {path}: {error.strerror}. Check the file.") from error
    if len(data) > MAX_INDEX_BYTES:
        _fail_index(path, "its length", "too large", f"at most {MAX_INDEX_BYTES} bytes")
    try:
        weight_map = read_json_object(data).get("weight_map")
    except ValueError as error:
        _fail_index(path, "its content", f"not JSON ({error})", "an object")
    if not isinstance(weight_map, dict) or not all(
        isinstance(file, str) for file in weight_map.values()
    ):
        _fail_index(path, "weight_map", repr(weight_map)[:80], "names of tensors and their files")
    return weight_map


def _fail_index(path: Path, field: str, found: str, expected: str) -> NoReturn:
    raise SafetensorsFileError(
        f"Cannot read {path}: {field} is {found}; expected {expected}. "
        "The index and the files do not belong together; fetch or save the adapter again."
    )


def _pair_tensors(
    folder: Path, config: PeftConfig, tensors: Mapping[str, StoredTensor]
) -> dict[str, PeftModule]:
    parts: dict[str, dict[str, StoredTensor]] = {}
    embeddings: set[str] = set()
    copies: list[StoredTensor] = []
    for name, tensor in tensors.items():
        match = _LORA_NAME.fullmatch(name.removeprefix(_PREFIX))
        if match is None:
            copies.append(tensor)
            continue
        module = match["module"]
        if match["part"] in parts.setdefault(module, {}):
            raise SafetensorsFileError(
                f"Cannot use {tensor.path}: module {module} has two tensors for lora_"
                f"{match['part']}; expected one. Save the adapter again."
            )
        parts[module][match["part"]] = tensor
        if match["embedding"]:
            embeddings.add(module)
    for tensor in copies:
        _check_copy(tensor, parts)
    if not parts:
        raise SafetensorsFileError(
            f"Cannot use the adapter {folder}: its weights hold no lora_A or lora_B; expected a "
            "trained LoRA. Save the adapter again."
        )
    return {
        module: _make_module(config, module, pair, is_embedding=module in embeddings)
        for module, pair in parts.items()
    }


def _check_copy(tensor: StoredTensor, parts: Mapping[str, object]) -> None:
    """Let pass the copy of the base's own weight that PEFT saves beside LoRA on embeddings."""
    module = tensor.name.removeprefix(_PREFIX).removesuffix(".base_layer.weight")
    if tensor.name.endswith(".base_layer.weight") and module in parts:
        return
    kind = next(
        (kind for end, kind in _FOREIGN.items() if tensor.name.endswith(end)), "not known here"
    )
    raise UnsupportedAdapterError(
        f"Cannot use {tensor.path}: tensor {tensor.name} is {kind}; expected only lora_A and "
        "lora_B, for a plain LoRA cannot represent more. Train a plain LoRA, or merge the adapter "
        "into its base."
    )


def _make_module(
    config: PeftConfig, module: str, pair: Mapping[str, StoredTensor], *, is_embedding: bool
) -> PeftModule:
    (present,) = pair if len(pair) == 1 else ("",)
    if present:
        missing = "B" if present == "A" else "A"
        raise SafetensorsFileError(
            f"Cannot use {pair[present].path}: module {module} has lora_{present} but no "
            f"lora_{missing}; expected both. The file is incomplete; save the adapter again."
        )
    a, b = pair["A"], pair["B"]
    for tensor in (a, b):
        if len(tensor.shape) != 2 or 0 in tensor.shape:
            raise UnsupportedAdapterError(
                f"Cannot use {tensor.path}: tensor {tensor.name} has shape {list(tensor.shape)}; "
                "expected a matrix. Only LoRA on linear layers and embeddings can be represented."
            )
    rank = config.rank_of(module)
    if not a.shape[0] == b.shape[1] == rank:
        raise PeftConfigError(
            f"Cannot use {config.path}: module {module} has rank {rank} by r and rank_pattern, but "
            f"lora_A is {list(a.shape)} and lora_B {list(b.shape)}; expected [{rank}, n_in] and "
            f"[n_out, {rank}]. The two files do not belong together; save the adapter again."
        )
    return PeftModule(
        name=module,
        rank=rank,
        n_in=a.shape[1],
        n_out=b.shape[0],
        scale=config.scale_of(module),
        is_embedding=is_embedding,
        a=a,
        b=b,
    )


def _check_not_tied(config: PeftConfig, modules: Mapping[str, PeftModule]) -> None:
    for name, module in modules.items():
        if module.is_embedding or name.rpartition(".")[2] == "lm_head":
            raise UnsupportedAdapterError(
                f"Cannot use {config.path}: ensure_weight_tying is true and module {name} has a "
                "LoRA; one LoRA shared by embedding and head cannot be represented. Train without "
                "it, or leave these modules out."
            )
