"""The modules of a LoRA: tensors of PEFT or MLX, paired, checked and read. No torch is needed.

Facts of ml-explore/mlx-lm d78bf58e: tuner/lora.py LoRALinear holds lora_a as [n_in, rank] and
lora_b as [rank, n_out], and adds lora_parameters.scale times their product, whatever the rank.
Modules carry the names of the HF model. A quantised base changes none of this.
LoRASwitchLinear, of a mixture's experts, holds lora_a as [n_expert, rank, n_in] and lora_b as
[n_expert, n_out, rank], under the name switch_mlp in place of HF's experts.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from qaflora_edge.arrays import F32
from qaflora_edge.errors import SafetensorsFileError, UnsupportedAdapterError
from qaflora_edge.files import AnyPath
from qaflora_edge.formats.gguf import DIVERGED
from qaflora_edge.formats.inputs import open_input, read_bytes, read_json_object, reading
from qaflora_edge.peft.config import REFUSED, LoraSize, PeftConfig, is_named

MAX_HEADER_BYTES = 1 << 24  # the format allows 100 MB; an adapter needs a few hundred KB
MAX_NAME_LENGTH = 256
MAX_READ_BYTES = 1 << 32  # of one tensor; rank 4096 on 256,000 tokens as F32
FORMS = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}  # the upper half of a float32


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a file: shape in numpy order, bytes from the start of the file."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    n_bytes: int

    def read(self) -> F32:
        """Read all values.

        returns  [*shape]  float32, finite

        Raises InputFileError when the file is gone, SafetensorsFileError when it became shorter,
        the type is no float, or a value is NaN or infinite.
        """
        if self.dtype not in FORMS:
            expected = f"{', '.join(FORMS)}. Save the adapter in one of these."
            raise self._wrong(f"its dtype is {self.dtype}", expected)
        if self.n_bytes > MAX_READ_BYTES:
            expected = f"at most {MAX_READ_BYTES} of a matrix. Check that it is a plain LoRA."
            raise self._wrong(f"it has {self.n_bytes} bytes", expected)
        raw = read_bytes(self.path, self.offset, self.n_bytes, SafetensorsFileError)
        values = np.frombuffer(raw, FORMS[self.dtype])
        if self.dtype == "BF16":
            values = (values.astype("<u4") << 16).view("<f4")
        if n_bad := values.size - int(np.count_nonzero(np.isfinite(values))):
            found = f"{n_bad} of its {values.size} values are NaN or infinite"
            raise self._wrong(found, f"finite numbers. {DIVERGED}")
        return values.astype(np.float32, copy=False).reshape(self.shape)

    def _wrong(self, found: str, expected: str) -> SafetensorsFileError:
        start = f"Cannot use tensor {self.name} of {self.path}"
        return SafetensorsFileError(f"{start}: {found}; expected {expected}")


def read_safetensors(path: AnyPath) -> dict[str, StoredTensor]:
    """Read and check the header of a safetensors file; values are read later, one by one.

    The package checks dtypes, sizes and that there are no holes. It takes a tensor named twice,
    gives numpy no bfloat16, and maps a file that someone may shorten: names are checked here.

    Raises InputFileError when it cannot be opened, SafetensorsFileError when it is not sound.
    """
    import safetensors

    path = Path(path)
    try:
        with reading(path), open_input(path) as file:
            n_header = int.from_bytes(file.read(8), "little")
            if n_header > MAX_HEADER_BYTES:
                raise ValueError(f"it has {n_header} bytes, expected at most {MAX_HEADER_BYTES}")
            header = file.read(n_header)
        with reading(path), safetensors.safe_open(path, "numpy"):
            entries = read_json_object(header)
        entries.pop("__metadata__", None)
        if (longest := max(map(len, entries), default=0)) > MAX_NAME_LENGTH:
            found = f"a tensor's name has {longest} characters, expected at most {MAX_NAME_LENGTH}"
            raise ValueError(found)
    except (safetensors.SafetensorError, ValueError) as error:  # errors of JSON and UTF-8 too
        raise SafetensorsFileError(
            f"Cannot read {path}: its header cannot be used ({error}). The file is truncated, "
            "corrupted or not a safetensors file; fetch or save it again."
        ) from error
    tensors = {}
    for name, entry in entries.items():
        begin, end = (8 + n_header + offset for offset in entry["data_offsets"])
        shape = tuple(entry["shape"])
        tensors[name] = StoredTensor(path, name, entry["dtype"], shape, begin, end - begin)
    return tensors


_PREFIX = "base_model.model."
# What torch.compile, DDP and FSDP put into the names of a model that is saved inside them.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_BASE_LAYER = ".base_layer"
# PEFT leaves out the adapter's name where it saves one adapter; a whole state has it in each key.
_LORA_NAME = re.compile(
    r"(?P<module>.+)\.(?:"
    r"lora_(?P<side>[AB])(?:\.weight|\.(?P<adapter>[^.]+)\.weight)?"
    r"|lora_embedding_(?P<embedding_side>[AB])(?:\.weight|\.(?P<embedding_adapter>[^.]+))?)"
)
_MLX_NAME = re.compile(r"(?P<module>.+)\.lora_(?P<side>[ab])")
_MLX_EXPERTS = re.compile(r".+\.switch_mlp\.(gate|up|down)_proj")
# The last name of what MLX makes an Embedding of.
_MLX_EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings")
# Of a layer's experts, in the order in which transformers 5 gives them to a module.
_STACKED = ("gate_up_proj", "down_proj")
Pairs = dict[str, dict[str, StoredTensor]]  # module -> "A" and "B", or "a" and "b" of MLX


@dataclass(frozen=True)
class PeftModule:
    """One projection of an adapter; its delta to the base's weight is scale * B A.

    For an embedding n_in is the vocabulary and the delta is transposed, as in PEFT.
    `is_transposed`: the file holds A as [n_in, rank] and B as [rank, n_out].
    `n_expert`: of a parameter that stacks experts, how many; A is then [n_expert * rank, n_in], one
    expert after the other, and B [n_out, rank * n_expert], the experts side by side in each rank.
    `is_b_by_expert`: B is [n_expert * n_out, rank] instead, one expert after the other, as in MLX.
    """

    name: str
    rank: int
    n_in: int
    n_out: int
    scale: float
    a: StoredTensor
    b: StoredTensor
    is_embedding: bool = False
    is_transposed: bool = False
    n_expert: int = 0
    is_b_by_expert: bool = False

    def read_a(self) -> F32:
        """returns  [rank, n_in]  float32, finite"""
        return self.a.read().T if self.is_transposed else self.a.read()

    def read_b(self) -> F32:
        """returns  [n_out, rank]  float32, finite"""
        return self.b.read().T if self.is_transposed else self.b.read()


def make_modules(config: PeftConfig, tensors: Mapping[str, StoredTensor]) -> dict[str, PeftModule]:
    """Pair the tensors of a folder and check that they fit its config.

    Raises SafetensorsFileError when one is missing, PeftConfigError when the two files do not
    belong together, UnsupportedAdapterError when they are more than a plain LoRA.
    """
    is_mlx = config.mlx_scale is not None
    embeddings: set[str] = set()
    pairs = _mlx_pairs(tensors) if is_mlx else _peft_pairs(config, tensors, embeddings)
    sides = ("a", "b") if is_mlx else ("A", "B")
    if not pairs:
        raise SafetensorsFileError(
            f"Cannot use the adapter {config.path.parent}: its weights hold no lora_{sides[0]} or "
            f"lora_{sides[1]}; expected a trained LoRA. Save the adapter again."
        )
    parameters = _parameter_names(config, pairs)
    modules = {}
    for name, pair in pairs.items():
        for side, missing in (sides, sides[::-1]):
            if missing not in pair:
                raise SafetensorsFileError(
                    f"Cannot use {pair[side].path}: module {name} has lora_{side} but no "
                    f"lora_{missing}; expected both. The file is incomplete; save the adapter "
                    "again."
                )
        a, b = (pair[side] for side in sides)
        parameter = parameters.get(name)
        if parameter is None:
            config.check_target(name)
        size = config.size_of(parameter or name)  # what PEFT's patterns are matched with
        if is_mlx:
            module = _mlx_module(config, name, size, a, b)
        else:
            module = _peft_module(config, name, size, a, b, parameter, name in embeddings)
        modules[module.name] = module
    return modules


def _check_matrix(tensor: StoredTensor) -> None:
    """Refuse a tensor that is no matrix, such as LoRA on a convolution."""
    if tensor.n_bytes == 0:
        raise SafetensorsFileError(
            f"Cannot use {tensor.path}: tensor {tensor.name} is empty, of shape "
            f"{list(tensor.shape)}; expected a matrix. DeepSpeed ZeRO-3 and FSDP leave such files "
            "where the parts of a matrix were not gathered before saving: save the adapter again "
            "with them gathered, for ZeRO-3 with stage3_gather_16bit_weights_on_model_save."
        )
    if len(tensor.shape) != 2:
        raise UnsupportedAdapterError(
            f"Cannot use {tensor.path}: tensor {tensor.name} has shape {list(tensor.shape)}; "
            "expected a matrix. Only LoRA on linear layers and embeddings can be represented."
        )


def _other_tensor(tensor: StoredTensor, name: str, pair: str, advice: str) -> Exception:
    features = (feature for end, feature in REFUSED["tensors"].items() if re.search(end, name))
    return UnsupportedAdapterError(
        f"Cannot use {tensor.path}: tensor {tensor.name} is {next(features, 'not known here')}; "
        f"expected only {pair}, for a plain LoRA cannot represent more. {advice}"
    )


def _peft_pairs(
    config: PeftConfig, tensors: Mapping[str, StoredTensor], embeddings: set[str]
) -> Pairs:
    """Pair tensors by the names that PEFT gives them.

    embeddings  is filled with the modules that have LoRA of an embedding
    """
    pairs: Pairs = {}
    adapters = set()
    copies: list[StoredTensor] = []
    for name, tensor in tensors.items():
        match = _LORA_NAME.fullmatch(_module_name(name))
        if match is None:
            copies.append(tensor)
            continue
        adapters.add(match["adapter"] or match["embedding_adapter"] or "")
        if len(adapters) > 1:
            names = ", ".join(
                repr(name) if name else "one without a name" for name in sorted(adapters)
            )
            raise UnsupportedAdapterError(
                f"Cannot use {tensor.path}: its tensors belong to several adapters, {names}; "
                "expected one. Load it with PEFT and save each with "
                "save_pretrained(selected_adapters=[...])."
            )
        module = match["module"]
        side = match["side"] or match["embedding_side"]
        if side in pairs.setdefault(module, {}):
            raise SafetensorsFileError(
                f"Cannot use {tensor.path}: module {module} has two tensors for lora_{side}; "
                "expected one. Save the adapter again."
            )
        pairs[module][side] = tensor
        if match["embedding_side"]:
            embeddings.add(module)
    for tensor in copies:
        _check_copy(config, tensor, pairs)
    return pairs


def _module_name(name: str) -> str:
    words = [word for word in name.split(".") if word not in _WRAPPERS]
    plain = ".".join(words).removeprefix(f"module.{_PREFIX}").removeprefix(_PREFIX)
    return plain.removeprefix(_PREFIX)  # PEFT in PEFT, as some trainers save it


def _check_copy(config: PeftConfig, tensor: StoredTensor, pairs: Collection[str]) -> None:
    """Let pass the copies of the base's own tensors that PEFT saves with LoRA on embeddings."""
    name = _module_name(tensor.name)
    module, _, suffix = name.rpartition(f"{_BASE_LAYER}.")
    if module in pairs and (suffix == "weight" or (suffix == "bias" and config.bias == "none")):
        return
    advice = "Train a plain LoRA, or merge the adapter into its base."
    if re.search(r"(^|\.)(embed_tokens|lm_head)(\.base_layer)?\.weight$", name):
        advice = (
            "PEFT saves these whole where the vocabulary was resized or an embedding is a target. "
            "If they were not trained, save the adapter again with "
            "save_pretrained(save_embedding_layers=False); else merge it into its base."
        )
    raise _other_tensor(tensor, name, "lora_A and lora_B", advice)


def _peft_module(
    config: PeftConfig,
    name: str,
    size: LoraSize,
    a: StoredTensor,
    b: StoredTensor,
    parameter: str | None,
    is_embedding: bool,
) -> PeftModule:
    """Check a module of PEFT.

    parameter  full name of the parameter that it adapts, where `target_parameters` names one
    """
    _check_matrix(a)
    _check_matrix(b)
    rank = size.rank
    is_stacked = parameter is not None and not parameter.endswith(".weight")
    n_expert = max(1, a.shape[0] // rank) if is_stacked else 0
    if not a.shape[0] == b.shape[1] == rank * max(1, n_expert):
        wanted = f"{rank} times the number of experts" if is_stacked else f"{rank}"
        raise config.mismatch(
            f"module {name} has rank {rank} by r and rank_pattern, but lora_A is {list(a.shape)} "
            f"and lora_B {list(b.shape)}; expected [{wanted}, n_in] and [n_out, {wanted}]"
        )
    if config.ties_weights and (is_embedding or name.rpartition(".")[2] == "lm_head"):
        raise UnsupportedAdapterError(
            f"Cannot use {config.path}: ensure_weight_tying is true and module {name} has a "
            "LoRA; one LoRA shared by embedding and head cannot be represented. Train without "
            "it, or leave these modules out."
        )
    return PeftModule(
        name=parameter if parameter and is_stacked else name,
        rank=rank,
        n_in=a.shape[1],
        n_out=b.shape[0],
        scale=size.scale,
        a=a,
        b=b,
        is_embedding=is_embedding,
        n_expert=n_expert,
    )


def _parameter_names(config: PeftConfig, modules: Iterable[str]) -> Mapping[str, str]:
    """Name the parameter of each module that has tensors and was adapted by `target_parameters`.

    PEFT wraps a module once for each of its parameters that are adapted, the first one innermost,
    and names the tensors by the wrappers: with two, `experts.base_layer.lora_A` is of the first and
    `experts.lora_A` of the second. Read in PEFT 0.21, tuners_utils.py _inject_parameters.

    modules  names as the file has them
    returns  module -> full name of the parameter, such as model.layers.0.mlp.experts.down_proj
    """
    targets = frozenset(config.parameters)
    last_parts = sorted({target.rpartition(".")[2] for target in targets})
    wrapped: dict[str, list[str]] = {}
    for module in modules if targets else ():
        owner = module
        while owner.endswith(_BASE_LAYER):
            owner = owner.removesuffix(_BASE_LAYER)
        wrapped.setdefault(owner, []).append(module)
    names = {}
    for owner, wrappers in wrapped.items():
        named = [name for name in last_parts if is_named(targets, f"{owner}.{name}")]
        parameters = _in_order(config, owner, named)
        if not parameters:
            continue
        if len(parameters) != len(wrappers):
            raise config.mismatch(
                f"target_parameters names {len(parameters)} parameters of module {owner} "
                f"({', '.join(parameters)}), and {len(wrappers)} have tensors; expected as many"
            )
        innermost_first = sorted(wrappers, key=len, reverse=True)
        for module, parameter in zip(innermost_first, parameters, strict=True):
            names[module] = f"{owner}.{parameter}"
    return names


def _in_order(config: PeftConfig, owner: str, named: Sequence[str]) -> list[str]:
    if owner.rpartition(".")[2] != "experts":  # of a plain module, only its weight can be low-rank
        return [name for name in named if name == "weight"]
    for name in named:
        if name not in _STACKED:
            raise UnsupportedAdapterError(
                f"Cannot use {config.path}: target_parameters names {name} of module {owner}; "
                f"expected {' or '.join(_STACKED)} of experts, for others cannot be represented. "
                "Train without it, or merge the adapter into its base."
            )
    return sorted(named, key=_STACKED.index)


def _mlx_pairs(tensors: Mapping[str, StoredTensor]) -> Pairs:
    pairs: Pairs = {}
    for name, tensor in tensors.items():
        match = _MLX_NAME.fullmatch(name)
        if match is None:
            # DoRA's name in MLX; PEFT calls the vector so.
            plain = f"{name}.lora_magnitude_vector" if name.endswith(".m") else name
            raise _other_tensor(tensor, plain, "lora_a and lora_b", "Train a plain LoRA.")
        if not (_MLX_EXPERTS.fullmatch(match["module"]) and len(tensor.shape) == 3):
            _check_matrix(tensor)
        pairs.setdefault(match["module"], {})[match["side"]] = tensor
    return pairs


def _mlx_module(
    config: PeftConfig, name: str, size: LoraSize, a: StoredTensor, b: StoredTensor
) -> PeftModule:
    rank = size.rank
    scale = size.scale
    if name.rpartition(".")[2] in _MLX_EMBEDDINGS:
        raise UnsupportedAdapterError(
            f"Cannot use {a.path}: module {name} is an embedding with a LoRA, which MLX "
            "applies to a tied head as well; expected LoRA on linear layers. Train without it."
        )
    if not _MLX_EXPERTS.fullmatch(name):
        if a.shape[1] == b.shape[0] == rank:
            return PeftModule(name, rank, a.shape[0], b.shape[1], scale, a, b, is_transposed=True)
        what = f"module {name} has"
        expected = f"[n_in, {rank}] and [{rank}, n_out]"
    else:
        if len(a.shape) == len(b.shape) == 3 and a.shape[0] == b.shape[0] > 0:
            n_expert = a.shape[0]
            n_in = a.shape[2]
            n_out = b.shape[1]
            if a.shape[1] == b.shape[2] == rank and n_in and n_out:
                a = replace(a, shape=(n_expert * rank, n_in))
                b = replace(b, shape=(n_expert * n_out, rank))
                return PeftModule(
                    name, rank, n_in, n_out, scale, a, b, n_expert=n_expert, is_b_by_expert=True
                )
        what = f"experts {name} have"
        expected = f"[n_expert, {rank}, n_in] and [n_expert, n_out, {rank}]"
    raise config.mismatch(
        f"{what} rank {rank} by lora_parameters, but lora_a is {list(a.shape)} and lora_b "
        f"{list(b.shape)}; expected {expected}"
    )
