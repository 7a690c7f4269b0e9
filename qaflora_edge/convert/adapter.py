"""Write adapter GGUFs, which stock llama.cpp loads too: of a PEFT folder, or of a mix.

`plan` says where each module goes; here values are scaled, put in the base's order, encoded and
written, one tensor at a time.
"""

import math
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.constants import GGMLQuantizationType
from numpy.typing import NDArray

from qaflora_edge import config
from qaflora_edge.arrays import F32
from qaflora_edge.convert.plan import plan_modules
from qaflora_edge.convert.planned import MixedModule, Written
from qaflora_edge.convert.verify import ModuleCheck, verify_conversion
from qaflora_edge.errors import OptionError, OutputFileError, UnsupportedAdapterError, WeightsError
from qaflora_edge.files import AnyPath, atomic_path, readable
from qaflora_edge.formats.adapter import EMBEDDING, HEAD, AdapterInfo, read_pair
from qaflora_edge.formats.gguf import GgufHeader, read_gguf_header
from qaflora_edge.formats.names import is_repo
from qaflora_edge.peft.folder import read_peft
from qaflora_edge.progress import TellCount, TellDone, silent

OUTTYPES = {name: GGMLQuantizationType[name.upper()] for name in config.OUTTYPES}
LARGEST_VALUE = {
    GGMLQuantizationType.F32: 3.4028234e38,
    GGMLQuantizationType.F16: 65504.0,
    GGMLQuantizationType.BF16: 3.3895313e38,
    GGMLQuantizationType.Q8_0: 127 * 65504.0,  # 8-bit numbers times a float16
}
_Q8_0_BLOCK = 32
_N_TOGETHER = 1 << 14  # values that are quantised at once, whole blocks
_FLOATS = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}


@dataclass(frozen=True)
class ConvertedAdapter:
    """What was written."""

    path: Path
    architecture: str
    alpha: float
    rank: int
    targets: tuple[str, ...]
    n_module: int
    size_bytes: int
    trained_on: str | None = None  # the base's repository, by the adapter's config
    base_name: str | None = None  # what the base's file calls itself
    checks: tuple[ModuleCheck, ...] = ()  # of a conversion that was verified


def convert_adapter(
    peft_dir: AnyPath,
    base: AnyPath | GgufHeader,
    out_path: AnyPath,
    *,
    outtype: str = "f16",
    verify: bool = False,
    name: str | None = None,
    progress: TellCount = silent,
) -> ConvertedAdapter:
    """Convert a PEFT folder for a base; the file is written whole or not at all.

    base    its GGUF file, or the header of that
    verify  read the file back before it takes its name, and compare each module with its source
    name    what the file calls the adapter, by default the folder's name

    Raises ConversionError when a module differs by more than rounding explains,
    InputFileError and its kinds for damaged input, UnsupportedAdapterError for what a
    plain LoRA cannot represent, AdapterMismatchError for another base.
    """
    if outtype not in OUTTYPES:
        raise OptionError(
            f"Cannot convert {os.fspath(peft_dir)}: the output type is {outtype!r}; expected "
            f"{', '.join(OUTTYPES)}."
        )
    out_path = Path(out_path)
    header = base if isinstance(base, GgufHeader) else read_gguf_header(base)
    adapter = read_peft(peft_dir)
    alpha, modules = plan_modules(adapter, header)
    sources = {tensor.path for m in adapter.modules.values() for tensor in (m.a, m.b)}
    for source in (header.path, adapter.config.path, *sources):
        if os.path.exists(out_path) and out_path.samefile(source):
            what = "the base itself" if source == header.path else "a file of the adapter"
            raise OutputFileError(f"Cannot write {out_path}: it is {what}. Choose another name.")
    trained_on = adapter.config.base_name
    if trained_on is not None and not is_repo(trained_on):
        trained_on = None  # a folder of whoever trained it
    n_step = len(modules) * (2 if verify else 1)

    def tell(n_done: int) -> None:
        progress(n_done, n_step)

    checks: tuple[ModuleCheck, ...] = ()
    with atomic_path(out_path) as temporary:
        with closing(gguf.GGUFWriter(temporary, header.architecture)) as writer:
            add_metadata(writer, readable(name or adapter.folder.resolve().name), trained_on)
            writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
            write_tensors(writer, modules, OUTTYPES[outtype], tell)
        if verify:
            checks = verify_conversion(
                temporary, modules, lambda n_done: tell(len(modules) + n_done)
            )
    return ConvertedAdapter(
        path=out_path,
        architecture=header.architecture,
        alpha=alpha,
        rank=max(module.rank for module in modules),
        targets=tuple(sorted({module.target for module in modules})),
        n_module=len(modules),
        size_bytes=out_path.stat().st_size,
        trained_on=trained_on,
        base_name=header.name,
        checks=checks,
    )


def add_metadata(writer: gguf.GGUFWriter, name: str, trained_on: str | None = None) -> None:
    """Add the keys of llama.cpp 0c1e5709, convert_lora_to_gguf.py."""
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_name(name)
    if trained_on is not None:  # as upstream does where the folder's card says it
        owner, _, repo = trained_on.partition("/")
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, repo)
        writer.add_base_model_organization(0, owner)
        writer.add_base_model_repo_url(0, f"https://huggingface.co/{trained_on}")
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def write_tensors(
    writer: gguf.GGUFWriter,
    modules: Sequence[Written],
    wanted: GGMLQuantizationType,
    tell: TellDone,
) -> None:
    """Write the header and all values, with one encoded tensor in memory at a time."""
    for module in modules:
        for side in "ab":
            shape = module.shape(side)
            tensor_type = stored_type(shape[-1], wanted)
            n_byte = math.prod(gguf.quant_shape_to_byte_shape(shape, tensor_type))
            tensor = f"{module.base_name}.lora_{side}"
            writer.add_tensor_info(tensor, shape, np.dtype(np.float32), n_byte, tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    (file,) = writer.fout
    for index, module in enumerate(modules):
        for side in "ab":
            data = encoded_tensor(module, side, wanted)
            # gguf's write_tensor_data uses numpy's tofile, which is silent about a full disk when
            # it has a few kilobytes to write.
            writer.write_padding(file, file.tell())
            file.write(np.ascontiguousarray(data, data.dtype.newbyteorder("<")))
            writer.write_padding(file, data.nbytes)
        tell(index + 1)


def stored_type(n_row: int, wanted: GGMLQuantizationType) -> GGMLQuantizationType:
    """Fall back to F16 where rows do not divide into blocks, as upstream's converter does."""
    if wanted == GGMLQuantizationType.Q8_0 and n_row % _Q8_0_BLOCK:
        return GGMLQuantizationType.F16
    return wanted


def encoded_tensor(module: Written, side: str, wanted: GGMLQuantizationType) -> NDArray[Any]:
    """Read and encode lora_a or lora_b of a module.

    returns  [n_row, n]  floats, or the bytes of their blocks, as the file holds them. Of experts,
             the rows of all of them

    Raises UnsupportedAdapterError for values that the type cannot hold.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # what becomes infinite is found below
        values = module.values(side)
    tensor_type = stored_type(values.shape[-1], wanted)
    highest = float(values.max(initial=0))
    lowest = float(values.min(initial=0))
    largest = max(highest, -lowest)
    if largest > LARGEST_VALUE[tensor_type]:
        raise UnsupportedAdapterError(
            f"Cannot convert module {module.name} of {module.path}: the largest value of "
            f"lora_{side.upper()} is {largest:g}, more than {tensor_type.name} holds. "
            "Choose output type f32, or check the adapter's alpha."
        )
    rows = values.reshape(-1, values.shape[-1])
    if tensor_type in _FLOATS:
        return rows.astype(_FLOATS[tensor_type])
    # As one row: gguf steps over rows in Python, and blocks are the same either way.
    flat = np.ascontiguousarray(rows).reshape(1, -1)
    blocks = []
    for begin in range(0, flat.size, _N_TOGETHER):
        floats = flat[:, begin : begin + _N_TOGETHER]
        blocks.append(gguf.quants.quantize(floats, tensor_type))
    return np.concatenate(blocks, axis=1).reshape(len(rows), -1)


_LAYERS = {EMBEDDING: 0, HEAD: -1}  # which layer's weights count for tensors of none


def mix_modules(adapters: Mapping[str, AdapterInfo], weights: F32) -> list[MixedModule]:
    """Put adapters side by side in each tensor of the base; every scale is 1 then.

    weights  [n_adapter, n_layer]; an adapter that weighs 0 in a layer adds no rank there

    Raises WeightsError when nothing is added.
    """
    first_paths: dict[str, Path] = {}  # base's tensor -> the first adapter of it
    sides_a = defaultdict(list)
    sides_b = defaultdict(list)
    for info, row in zip(adapters.values(), weights, strict=True):
        for name in info.ranks:
            layer = _LAYERS[name] if name in _LAYERS else int(name.split(".")[1])
            weight = row[layer]
            if weight == 0:
                continue
            a, b, scale = read_pair(info, name)
            first_paths.setdefault(name, info.path)
            sides_a[name].append(a)
            sides_b[name].append(b * np.float32(weight * scale))
    if not first_paths:
        raise WeightsError(
            "Cannot export the mix: no adapter weighs anything where it adapts the base, which "
            "answers alone; expected one that does. Choose other weights, or another prompt."
        )
    modules = []
    for name, path in first_paths.items():
        rank_axis = -1 if name == EMBEDDING else -2
        mixed_a = np.concatenate(sides_a[name], axis=rank_axis)
        mixed_b = np.concatenate(sides_b[name], axis=-1)
        modules.append(MixedModule(name, name, path, mixed_a, mixed_b))
    return modules


def write_mix(
    path: Path, header: GgufHeader, modules: Sequence[MixedModule], name: str, outtype: str
) -> None:
    """Write a mix as an adapter GGUF that calls itself `name`.

    Raises UnsupportedAdapterError for what llama.cpp does not take.
    """
    for module in modules:
        # llama.cpp 0c1e5709 does not load a tied head's adapter, and aborts at an embedding's.
        if module.name in (EMBEDDING, HEAD) and HEAD not in header.tensors:
            raise UnsupportedAdapterError(
                f"Cannot export the mix: {module.path} adapts {module.name}, and llama.cpp takes "
                "no adapter of an embedding that is the head too; expected projections of layers. "
                "Leave this adapter out."
            )
    alpha = max(module.b.shape[-1] for module in modules)  # a tensor's scale is alpha / rank
    scaled = []
    for module in modules:
        factor = np.float32(module.b.shape[-1] / alpha)
        scaled.append(replace(module, b=module.b * factor))
    with closing(gguf.GGUFWriter(path, header.architecture)) as writer:
        add_metadata(writer, name)
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        write_tensors(writer, scaled, OUTTYPES[outtype], silent)
