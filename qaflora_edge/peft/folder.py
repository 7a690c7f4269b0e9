"""A folder of PEFT or MLX: where the adapter's files are, and what they hold."""

import contextlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qaflora_edge.errors import InputFileError, SafetensorsFileError
from qaflora_edge.files import AnyPath, read_input, what_is_at
from qaflora_edge.formats.bundle import BUNDLE_FILE
from qaflora_edge.formats.json_text import read_json_object
from qaflora_edge.formats.safetensors import StoredTensor, read_safetensors
from qaflora_edge.peft.config import CONFIG_FILE, PeftConfig, parse_config, read_fields
from qaflora_edge.peft.modules import PeftModule, make_modules

WEIGHTS_FILE = "adapter_model.safetensors"
INDEX_FILE = "adapter_model.safetensors.index.json"
MLX_FILE, OLD_MLX_FILE = "adapters.safetensors", "adapters.npz"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")  # ends of names of adapters that are pickles
MAX_INDEX_BYTES = 1 << 24
MAX_SHARDS = 1000
MAX_SUBFOLDERS = 1000
MAX_SEARCHED = 50  # sub-folders that are searched for advice


@dataclass(frozen=True)
class PeftAdapter:
    """A checked folder; the values are read when asked for."""

    config: PeftConfig
    modules: Mapping[str, PeftModule]

    @property
    def folder(self) -> Path:
        return self.config.path.parent

    @property
    def trained_on(self) -> str:
        """Quote the config's name of its base, for the end of a sentence."""
        name = self.config.base_name
        return f" (adapter_config.json says {name[:200]!r})" if name else ""


def read_peft(folder: AnyPath) -> PeftAdapter:
    """Read and check a PEFT folder, or one of MLX.

    Raises InputFileError and its kinds when a file is missing or damaged,
    UnsupportedAdapterError when the adapter is more than a plain LoRA.
    """
    folder = adapter_folder(folder)
    config = parse_config(folder / CONFIG_FILE, read_fields(folder))
    tensors = _read_weights(folder) if config.mlx_scale is None else _read_mlx_weights(folder)
    return PeftAdapter(config, make_modules(config, tensors))


def adapter_folder(folder: AnyPath) -> Path:
    """Give the folder that holds the adapter: itself, or its one sub-folder that does.

    PEFT saves an adapter called NAME in PEFT_DIR/NAME, and trainers save checkpoints so.

    Raises InputFileError when there is none, or when there are several to choose from.
    """
    folder = Path(folder)
    if not os.path.isdir(folder):
        raise InputFileError(
            f"Cannot read the adapter {folder}: it {what_is_at(folder)}; expected a PEFT folder "
            f"with {CONFIG_FILE} and {WEIGHTS_FILE}. {_advice_for_file(folder)}"
        )
    if os.path.exists(folder / CONFIG_FILE):
        return folder
    inside = _subfolders(folder)
    if len(inside) > 1:
        names = ", ".join(sub.name for sub in inside[:10]) + (", ..." if len(inside) > 10 else "")
        raise InputFileError(
            f"Cannot read the adapter {folder}: it holds {len(inside)} adapters in sub-folders, "
            f"{names}; expected one. Give one of them, such as {inside[-1]}."
        )
    if not inside:
        raise InputFileError(
            f"Cannot read the adapter {folder}: {CONFIG_FILE} is missing; expected a PEFT folder. "
            f"{_advice_for_folder(folder)}"
        )
    return inside[0]


def check_no_part(path: Path) -> None:
    """Refuse a file of a PEFT folder that is given in place of the folder."""
    if os.path.isfile(path) and path.suffix != ".gguf" and _is_adapter(path.parent):
        raise InputFileError(
            f"Cannot read the adapter {path}: it is a file of a PEFT folder; expected the folder. "
            f"{_advice_for_file(path)}"
        )


def _advice_for_file(path: Path) -> str:
    """Say what to do instead of giving a path that is no folder."""
    if not os.path.isfile(path):
        return "Check the path."
    if path.suffix == ".gguf":
        return (
            "A GGUF is not converted: put an adapter GGUF in a bundle as it is, with `qaflora "
            "bundle create`."
        )
    return f"Give {path.parent}." if _is_adapter(path.parent) else "Give the folder that it is in."


def _advice_for_folder(folder: Path) -> str:
    """Say what to do with a folder that is no adapter, by what it holds."""
    for sub in reversed(_entries(folder)[:MAX_SEARCHED]):  # as trainers nest runs and checkpoints
        with contextlib.suppress(InputFileError):  # one that may not be read
            if inside := _subfolders(sub):
                return f"There is one in {inside[-1]}; give that."
    if os.path.isfile(folder / BUNDLE_FILE):
        place = folder / "adapters" / "NAME.gguf"
        return f"It is a bundle; of a bundle give one file, such as {place}."
    if os.path.isfile(folder / WEIGHTS_FILE):
        return (
            f"Without it nobody knows the scale of {WEIGHTS_FILE}: fetch or save it as well, with "
            "PEFT's save_pretrained."
        )
    if ggufs := sorted(folder.glob("*.gguf")):
        return f"Of an adapter GGUF give the file, such as {ggufs[0]}."
    if os.path.isfile(folder / "config.json"):
        return (
            "It holds a whole model: a merged adapter is no adapter any more. Give the folder that "
            "was merged, or make the model itself a base with llama.cpp's convert_hf_to_gguf.py."
        )
    return "Give the folder that PEFT's save_pretrained wrote."


def _subfolders(folder: Path) -> list[Path]:
    """Give the sub-folders that are adapters, checkpoint-9 before checkpoint-10."""
    return [sub for sub in _entries(folder) if _is_adapter(sub)]


def _is_adapter(folder: Path) -> bool:
    return os.path.isfile(folder / CONFIG_FILE)


def _entries(folder: Path) -> list[Path]:
    """Give the sub-folders, sorted by the numbers in their names."""
    try:
        entries = [entry.name for entry in os.scandir(folder) if entry.is_dir()]
    except OSError as error:
        raise InputFileError(
            f"Cannot read the adapter {folder}: listing it failed ({error.strerror}); expected a "
            "PEFT folder. Check that you may read it."
        ) from error

    def natural(name: str) -> list[tuple[int, str]]:
        parts = re.split(r"(\d{1,18})", name)
        return [(int(part), "") if part.isdecimal() else (0, part) for part in parts]

    return [folder / name for name in sorted(entries, key=natural)[:MAX_SUBFOLDERS]]


def _read_weights(folder: Path) -> dict[str, StoredTensor]:
    """Read the header of a PEFT folder's weights, in one file or in several."""
    path = folder / INDEX_FILE
    if (folder / WEIGHTS_FILE).is_file():
        return read_safetensors(folder / WEIGHTS_FILE)
    if path.is_file():
        return _read_shards(path)
    if pickles := sorted(path.name for path in folder.glob("adapter*") if path.suffix in PICKLES):
        raise InputFileError(
            f"Cannot read the adapter {folder}: it has {pickles[0]}, and pickles are not opened "
            f"because they can run code; expected {WEIGHTS_FILE}. Load it with PEFT and save it "
            "with save_pretrained(..., safe_serialization=True)."
        )
    raise InputFileError(
        f"Cannot read the adapter {folder}: {WEIGHTS_FILE} is missing. "
        "Give the folder that PEFT's save_pretrained wrote."
    )


def _read_shards(path: Path) -> dict[str, StoredTensor]:
    """Read the headers of the files that an index names."""

    def wrong(field: str, found: str, expected: str) -> SafetensorsFileError:
        return SafetensorsFileError(
            f"Cannot read {path}: {field} is {found}; expected {expected}. "
            "The index and the files do not belong together; fetch or save the adapter again."
        )

    try:
        weight_map = read_json_object(read_input(path, MAX_INDEX_BYTES)).get("weight_map")
    except OSError as error:
        raise InputFileError(
            f"Cannot read {path}: opening or reading it failed ({error.strerror}); expected the "
            "list of the adapter's files. Check that you may read it."
        ) from error
    except ValueError as error:
        raise wrong("its content", f"not JSON ({error})", "an object") from error
    if not isinstance(weight_map, dict) or not all(
        isinstance(file, str) for file in weight_map.values()
    ):
        raise wrong("weight_map", repr(weight_map)[:80], "names of tensors and their files")
    files = sorted(set(weight_map.values()))
    if len(files) > MAX_SHARDS:
        raise wrong("the number of files", str(len(files)), f"at most {MAX_SHARDS}")
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors", file):
            raise wrong("a file in weight_map", repr(file), "a .safetensors file beside it")
        for name, tensor in read_safetensors(path.parent / file).items():
            if weight_map.get(name) != file:
                place = weight_map.get(name, "no file")
                raise wrong(f"tensor {name}", f"in {file}", f"in {place}")
            tensors[name] = tensor
    for name, file in weight_map.items():
        if name not in tensors:
            raise wrong(f"tensor {name}", "missing", f"in {file}")
    return tensors


def _read_mlx_weights(folder: Path) -> dict[str, StoredTensor]:
    if (folder / MLX_FILE).is_file():
        return read_safetensors(folder / MLX_FILE)
    if (folder / OLD_MLX_FILE).is_file():
        raise InputFileError(
            f"Cannot read the adapter {folder}: it has {OLD_MLX_FILE}, the format of early MLX; "
            f"expected {MLX_FILE}. Load it with mlx.core.load and save it with "
            "mlx.core.save_safetensors."
        )
    raise InputFileError(
        f"Cannot read the adapter {folder}: {MLX_FILE} is missing, which belongs to an "
        f"{CONFIG_FILE} of MLX. Give the folder that mlx_lm.lora wrote."
    )
