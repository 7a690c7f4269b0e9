"""Find the files of an adapter in its folder, and read the headers of its weights."""

import os
import re
from pathlib import Path
from typing import NoReturn

from qaflora_edge.errors import InputFileError, SafetensorsFileError
from qaflora_edge.files import open_input
from qaflora_edge.formats.json_text import read_json_object
from qaflora_edge.formats.safetensors_file import StoredTensor, read_safetensors
from qaflora_edge.peft.config import CONFIG_FILE

WEIGHTS_FILE = "adapter_model.safetensors"
INDEX_FILE = "adapter_model.safetensors.index.json"
PICKLE_FILE = "adapter_model.bin"
MAX_INDEX_BYTES = 1 << 24
MAX_SHARDS = 1000
MAX_SUBFOLDERS = 1000


def adapter_folder(folder: str | os.PathLike[str]) -> Path:
    """Give the folder that holds the adapter: itself, or its one sub-folder that does.

    PEFT saves an adapter called NAME in PEFT_DIR/NAME, and trainers save checkpoints so.

    Raises InputFileError when there is none, or when there are several to choose from.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise InputFileError(
            f"Cannot read the adapter {folder}: it {what}; expected a PEFT folder with "
            f"{CONFIG_FILE} and {WEIGHTS_FILE}. Check the path."
        )
    if (folder / CONFIG_FILE).exists():
        return folder
    inside = _subfolders(folder)
    if len(inside) > 1:
        names = ", ".join(sub.name for sub in inside[:10]) + (", ..." if len(inside) > 10 else "")
        raise InputFileError(
            f"Cannot read the adapter {folder}: it holds {len(inside)} adapters in sub-folders, "
            f"{names}; expected one. Give one of them, such as {inside[0]}."
        )
    return inside[0] if inside else folder


def _subfolders(folder: Path) -> list[Path]:
    try:
        entries = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    except OSError as error:
        raise InputFileError(
            f"Cannot read the adapter {folder}: listing it failed ({error.strerror}); expected a "
            "PEFT folder. Check that you may read it."
        ) from error
    inside = (folder / name for name in entries[:MAX_SUBFOLDERS])
    return [sub for sub in inside if (sub / CONFIG_FILE).is_file()]


def read_weights(folder: Path) -> dict[str, StoredTensor]:
    """Read the header of a PEFT folder's weights, in one file or in several."""
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
        raise InputFileError(
            f"Cannot read {path}: opening or reading it failed ({error.strerror}); expected the "
            "list of the adapter's files. Check that you may read it."
        ) from error
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
