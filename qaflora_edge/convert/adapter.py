"""Convert a PEFT folder to an adapter GGUF that stock llama.cpp loads too.

`plan` says where each module goes and `encode` turns its values; here the file is written,
one encoded tensor in memory at a time.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.constants import GGMLQuantizationType
from numpy.typing import NDArray

from qaflora_edge.convert.encode import (
    OUTTYPES,
    encoded_tensor,
    stored_bytes,
    stored_shape,
    stored_type,
)
from qaflora_edge.convert.plan import Planned, plan_modules
from qaflora_edge.convert.verify import ModuleCheck, verify_conversion
from qaflora_edge.errors import OptionError, OutputFileError
from qaflora_edge.files import AnyPath, atomic_path, readable
from qaflora_edge.formats.gguf import read_gguf_header
from qaflora_edge.formats.names import is_repo
from qaflora_edge.peft.folder import read_peft
from qaflora_edge.progress import TellBytes, TellCount


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
    trained_on: str | None = None  # the base's repository, by the adapter's config
    base_name: str | None = None  # what the base's file calls itself
    checks: tuple[ModuleCheck, ...] = ()  # of a conversion that was verified


def convert_adapter(
    peft_dir: AnyPath,
    base_gguf: AnyPath,
    out_path: AnyPath,
    *,
    outtype: str = "f16",
    verify: bool = False,
    name: str | None = None,
    progress: TellCount | None = None,
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
    _check_is_no_source(out_path, "the base itself", [header.path])
    adapter = read_peft(peft_dir)
    sources = {
        tensor.path for module in adapter.modules.values() for tensor in (module.a, module.b)
    }
    _check_is_no_source(out_path, "a file of the adapter", [adapter.config.path, *sources])
    alpha, modules = plan_modules(adapter, header)
    name = readable(name or adapter.folder.resolve().name)
    trained_on = adapter.config.base_name
    if trained_on is not None and not is_repo(trained_on):
        trained_on = None  # a folder of whoever trained it
    n_step, kind = len(modules) * (2 if verify else 1), OUTTYPES[outtype]

    def tell(n_done: int) -> None:
        if progress is not None:
            progress(n_done, n_step)

    checks: tuple[ModuleCheck, ...] = ()
    with atomic_path(out_path) as temporary:
        _write(temporary, header.architecture, name, trained_on, alpha, modules, kind, tell)
        if verify:
            checks = verify_conversion(
                temporary, header, modules, lambda n_done: tell(len(modules) + n_done)
            )
    return ConvertedAdapter(
        path=out_path,
        architecture=header.architecture,
        alpha=alpha,
        rank=max(module.rank for module in modules),
        targets=tuple(sorted({module.kind for module in modules})),
        n_module=len(modules),
        n_rescaled=sum(module.is_rescaled for module in modules),
        size_bytes=out_path.stat().st_size,
        trained_on=trained_on,
        base_name=header.name,
        checks=checks,
    )


def _check_is_no_source(out_path: Path, what: str, sources: Iterable[Path]) -> None:
    if os.path.exists(out_path) and any(out_path.samefile(source) for source in sources):
        raise OutputFileError(f"Cannot write {out_path}: it is {what}. Choose another name.")


def _write(
    path: Path,
    architecture: str,
    name: str,
    trained_on: str | None,
    alpha: float,
    modules: Sequence[Planned],
    wanted: GGMLQuantizationType,
    tell: TellBytes,
) -> None:
    """Write the file with one encoded tensor in memory at a time."""
    writer = gguf.GGUFWriter(path, architecture)
    try:
        # The keys of llama.cpp 0c1e5709, convert_lora_to_gguf.py.
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_name(name)
        if trained_on is not None:
            _add_base_model(writer, trained_on)
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for module in modules:
            for side in "ab":
                shape = stored_shape(module, side)
                kind = stored_type(shape[-1], wanted)
                n_bytes = stored_bytes(module, side, wanted)
                tensor = f"{module.base_name}.lora_{side}"
                writer.add_tensor_info(tensor, shape, np.dtype(np.float32), n_bytes, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        sizes = [stored_bytes(module, side, wanted) for module in modules for side in "ab"]
        buffer = np.empty(max(sizes), np.uint8)
        for index, module in enumerate(modules):
            for side in "ab":
                _write_data(writer, encoded_tensor(module, side, wanted, buffer))
            tell(index + 1)
    finally:
        writer.close()


def _add_base_model(writer: gguf.GGUFWriter, repo: str) -> None:
    """Name what it was trained on, as upstream does where the folder's card says it."""
    owner, _, name = repo.partition("/")
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, name)
    writer.add_base_model_organization(0, owner)
    writer.add_base_model_repo_url(0, f"https://huggingface.co/{repo}")


def _write_data(writer: gguf.GGUFWriter, data: NDArray[Any]) -> None:
    """Write the data of the next tensor.

    gguf's write_tensor_data uses numpy's tofile, which is silent about a full disk when it has a
    few kilobytes to write.
    """
    (file,) = writer.fout
    writer.write_padding(file, file.tell())
    file.write(np.ascontiguousarray(data, data.dtype.newbyteorder("<")))
    writer.write_padding(file, data.nbytes)
