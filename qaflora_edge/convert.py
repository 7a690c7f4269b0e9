"""Convert a PEFT folder to an adapter GGUF that stock llama.cpp loads too.

`convert_plan` says where each module goes; here its values are turned and written, one tensor in
memory at a time.
"""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.constants import GGMLQuantizationType
from numpy.typing import NDArray

from qaflora_edge.convert_plan import PlannedModule, plan_modules
from qaflora_edge.errors import OptionError, OutputFileError, UnsupportedAdapterError
from qaflora_edge.files import atomic_path
from qaflora_edge.gguf_header import F32, read_gguf_header
from qaflora_edge.peft import read_peft
from qaflora_edge.safetensors_file import PIECE_BYTES
from qaflora_edge.verify import ModuleCheck, verify_conversion

Progress = Callable[[int, int], None]  # steps done, steps in all: modules written and verified

OUTTYPES = {
    "f32": GGMLQuantizationType.F32,
    "f16": GGMLQuantizationType.F16,
    "bf16": GGMLQuantizationType.BF16,
    "q8_0": GGMLQuantizationType.Q8_0,
}
LARGEST_VALUE = {
    GGMLQuantizationType.F32: 3.4028234e38,
    GGMLQuantizationType.F16: 65504.0,
    GGMLQuantizationType.BF16: 3.3895313e38,
    GGMLQuantizationType.Q8_0: 127 * 65504.0,  # 8-bit numbers times a float16
}
_Q8_0_BLOCK = 32


@dataclass(frozen=True)
class ConvertedAdapter:
    """What was written. `n_rescaled` modules carry a part of their scale in B."""

    path: Path
    architecture: str
    alpha: float
    rank: int
    targets: tuple[str, ...]
    n_module: int
    n_rescaled: int
    size_bytes: int
    checks: tuple[ModuleCheck, ...] = ()  # of a conversion that was verified


def convert_adapter(
    peft_dir: str | os.PathLike[str],
    base_gguf: str | os.PathLike[str],
    out_path: str | os.PathLike[str],
    *,
    outtype: str = "f16",
    verify: bool = False,
    name: str | None = None,
    progress: Progress | None = None,
) -> ConvertedAdapter:
    """Convert a PEFT folder for a base; the file is written whole or not at all.

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
    header = read_gguf_header(base_gguf)
    if out_path.exists() and out_path.samefile(header.path):
        raise OutputFileError(
            f"Cannot write {out_path}: it is the base itself. Choose another name."
        )
    adapter = read_peft(peft_dir)
    alpha, modules = plan_modules(adapter, header)
    name = name or adapter.folder.resolve().name
    n_step = len(modules) * (2 if verify else 1)

    def tell(n_done: int) -> None:
        if progress is not None:
            progress(n_done, n_step)

    checks: tuple[ModuleCheck, ...] = ()
    with atomic_path(out_path) as temporary:
        try:
            _write(temporary, header.architecture, name, alpha, modules, OUTTYPES[outtype], tell)
        except OSError as error:
            raise OutputFileError(
                f"Cannot write {out_path}: writing failed ({error}). "
                "Check that there is space left and try again."
            ) from error
        if verify:
            checks = verify_conversion(
                temporary, header, modules, lambda n_done: tell(len(modules) + n_done)
            )
    return ConvertedAdapter(
        path=out_path,
        architecture=header.architecture,
        alpha=alpha,
        rank=max(module.source.rank for module in modules),
        targets=tuple(sorted({module.kind for module in modules})),
        n_module=len(modules),
        n_rescaled=sum(module.factor != 1.0 for module in modules),
        size_bytes=out_path.stat().st_size,
        checks=checks,
    )


def converted_a(module: PlannedModule) -> F32:
    """Read A as the GGUF holds it.

    returns  [rank, n_in], of an embedding [n_vocab, rank]
    """
    # llama.cpp 0c1e5709, llama-graph.cpp build_inp_embd takes rows of A by token.
    return module.source.read_a(transposed=module.source.is_embedding)


def converted_b(module: PlannedModule) -> F32:
    """Read B as the GGUF holds it.

    returns  [n_out, rank]  scaled, in the order of the tensor's rows
    """
    b = module.source.read_b()
    if module.factor != 1.0:
        with np.errstate(over="ignore"):  # _check_range finds what became infinite
            b *= np.float32(module.factor)
    return b if module.rows is None else b[module.rows]


def stored_type(n_row: int, wanted: GGMLQuantizationType) -> GGMLQuantizationType:
    """Fall back to F16 where rows do not divide into blocks, as upstream's converter does."""
    if wanted == GGMLQuantizationType.Q8_0 and n_row % _Q8_0_BLOCK:
        return GGMLQuantizationType.F16
    return wanted


def encode(values: F32, kind: GGMLQuantizationType) -> NDArray[Any]:
    """Turn float32 values into what the file stores: floats, or bytes of blocks.

    values  [n_row, n]
    """
    if kind == GGMLQuantizationType.F32:
        return values
    if kind == GGMLQuantizationType.F16:
        return values.astype(np.float16)
    # By slices of rows, for gguf makes several copies of what it is given.
    encoded = np.empty(gguf.quant_shape_to_byte_shape(values.shape, kind), np.uint8)
    n_piece_row = max(1, PIECE_BYTES // (4 * values.shape[-1]))
    for begin in range(0, len(values), n_piece_row):
        piece = slice(begin, begin + n_piece_row)
        encoded[piece] = gguf.quants.quantize(values[piece], kind)
    return encoded


def _write(
    path: Path,
    architecture: str,
    name: str,
    alpha: float,
    modules: Sequence[PlannedModule],
    wanted: GGMLQuantizationType,
    tell: Callable[[int], None],
) -> None:
    """Write the file with one tensor's values in memory at a time."""
    writer = gguf.GGUFWriter(path, architecture)
    try:
        # The keys of llama.cpp 0c1e5709, convert_lora_to_gguf.py.
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_name(name)
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for module in modules:
            for tensor_name, shape in _stored_shapes(module).items():
                kind = stored_type(shape[-1], wanted)
                n_bytes = math.prod(gguf.quant_shape_to_byte_shape(shape, kind))
                writer.add_tensor_info(tensor_name, shape, np.dtype(np.float32), n_bytes, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for index, module in enumerate(modules):
            _write_tensor(writer, module, "a", converted_a(module), wanted)
            _write_tensor(writer, module, "b", converted_b(module), wanted)
            tell(index + 1)
    finally:
        writer.close()


def _write_tensor(
    writer: gguf.GGUFWriter,
    module: PlannedModule,
    side: str,
    values: F32,
    wanted: GGMLQuantizationType,
) -> None:
    kind = stored_type(values.shape[-1], wanted)
    _check_range(module, side, values, kind)
    writer.write_tensor_data(encode(values, kind))


def _stored_shapes(module: PlannedModule) -> dict[str, tuple[int, int]]:
    source = module.source
    a_shape = (source.n_in, source.rank) if source.is_embedding else (source.rank, source.n_in)
    return {
        f"{module.base_name}.lora_a": a_shape,
        f"{module.base_name}.lora_b": (module.n_out, source.rank),
    }


def _check_range(module: PlannedModule, side: str, values: F32, kind: GGMLQuantizationType) -> None:
    """Refuse values that the stored type cannot hold."""
    largest = max(float(values.max()), -float(values.min()))
    if largest > LARGEST_VALUE[kind]:
        raise UnsupportedAdapterError(
            f"Cannot convert module {module.source.name} of {module.source.b.path}: the largest "
            f"value of lora_{side.upper()} is {largest:g}, more than {kind.name} holds. "
            "Choose output type f32, or check the adapter's alpha."
        )
