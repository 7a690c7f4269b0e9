"""Make a bundle: convert or copy adapters, measure them, write bundle.json. All or nothing."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from qaflora_edge import fusion as fuse
from qaflora_edge import registry
from qaflora_edge.adapter_gguf import AdapterInfo, check_adapter, read_adapter_gguf
from qaflora_edge.bundle_format import BUNDLE_FILE, FORMAT, MAX_ADAPTERS, NAME_PATTERN, NAME_RULE
from qaflora_edge.checksums import hash_file
from qaflora_edge.convert import convert_adapter
from qaflora_edge.errors import BundleError, GgufFileError, InputFileError, OutputFileError
from qaflora_edge.files import is_disk_full, sha256_file, write_text_atomic
from qaflora_edge.gguf_header import GgufHeader, read_gguf_header
from qaflora_edge.neutral import neutral_prompts, prompts_sha256
from qaflora_edge.references import model_name, pulled_model

# Called with what is being done, the steps (or bytes) done and those in all.
Progress = Callable[[str, int, int], None]
Path_ = str | os.PathLike[str]

_CALIBRATION_CTX = 512  # tokens; the neutral prompts are short


def create_bundle(
    folder: Path_,
    base: Path_,
    adapters: Mapping[str, Path_] | Iterable[tuple[str, Path_]],
    *,
    name: str | None = None,
    description: str = "",
    license: str = "",
    outtype: str = "f16",
    strategy: str = fuse.DEFAULT_STRATEGY,
    lens: str = fuse.DEFAULT_LENS,
    pool: str = fuse.DEFAULT_POOL,
    notes: Mapping[str, Mapping[str, str]] | None = None,
    calibrate: bool = True,
    progress: Progress | None = None,
) -> Path:
    """Make the folder of a new bundle.

    base       a GGUF file, or the name of a registry model that was pulled; only the name is
               recorded then, so the bundle works wherever that model is pulled
    adapters   name -> a PEFT folder, which is converted, or an adapter GGUF, which is copied
    outtype    of converted adapters: f32, f16, bf16 or q8_0
    strategy, lens, pool  what an Engine takes by default
    notes      adapter name -> source, license, description
    calibrate  measure typical divergences (needs the native library)
    returns    the folder

    Raises a QafloraError and leaves nothing behind when anything fails.
    """
    folder = Path(folder)
    pairs = list(adapters.items() if isinstance(adapters, Mapping) else adapters)
    _check_names([adapter_name for adapter_name, _ in pairs], notes or {})
    fuse.parse_strategy(strategy, [adapter_name for adapter_name, _ in pairs])
    fuse.check_choice("lens", lens, fuse.LENSES)
    fuse.check_choice("pool", pool, fuse.POOLS)
    tell = progress or (lambda what, done, total: None)
    base_path, registry_name = _find_base(base)
    header = read_gguf_header(base_path)
    with _new_folder(folder) as temporary:
        base_record = _base_record(base_path, registry_name, header, tell)
        (temporary / "adapters").mkdir()
        records = []
        for done, (adapter_name, source) in enumerate(pairs):
            tell("adapters", done, len(pairs))
            file = f"adapters/{adapter_name}.gguf"
            info = _put_adapter(Path(source), temporary / file, base_path, header, outtype)
            note = (notes or {}).get(adapter_name, {})
            records.append(_adapter_record(adapter_name, file, info, Path(source), note))
        tell("adapters", len(pairs), len(pairs))
        fusion: dict[str, Any] = {"strategy": strategy, "lens": lens, "pool": pool}
        if calibrate and pairs:
            paths = {record["name"]: temporary / record["file"] for record in records}
            fusion |= _measure(base_path, paths, tell)
        text = {
            "format": FORMAT,
            "name": name or folder.resolve().name,
            "description": description,
            "license": license,
            "base": base_record,
            "adapters": records,
            "fusion": fusion,
        }
        write_text_atomic(temporary / BUNDLE_FILE, _dump(text))
    return folder


def _check_names(names: list[str], notes: Mapping[str, Any]) -> None:
    seen: set[str] = set()
    for name in names:
        if not NAME_PATTERN.fullmatch(name):
            raise BundleError(f"The adapter name {name!r} cannot be used; expected {NAME_RULE}.")
        if name.lower() in seen:
            raise BundleError(
                f"The adapter name {name!r} is given twice (capital letters make no difference: "
                "names become file names); give each adapter a name of its own."
            )
        seen.add(name.lower())
    if len(names) > MAX_ADAPTERS:
        raise BundleError(
            f"{len(names)} adapters are too many for one bundle; expected at most {MAX_ADAPTERS}."
        )
    for name in notes:
        if name not in names:
            raise BundleError(
                f"A note is given for the adapter {name!r}, which is not in the bundle; "
                f"expected one of: {', '.join(names) or 'it has no adapters'}."
            )


def _find_base(base: Path_) -> tuple[Path, str | None]:
    """The base's file, and its registry name when it was given by that."""
    path = Path(base)
    if path.is_file():
        return path, None
    name = os.fspath(base)
    if name in registry.load_registry():
        pulled = pulled_model(name)
        if pulled is None:
            raise GgufFileError(
                f"The base {name} is in the registry but not on this machine; "
                f"fetch it with `qaflora pull {name}`."
            )
        return pulled, name
    raise GgufFileError(
        f"The base {path} does not exist; give a GGUF file, or the name of a model from "
        "`qaflora models` that was pulled."
    )


def _base_record(
    path: Path, registry_name: str | None, header: GgufHeader, tell: Progress
) -> dict[str, Any]:
    size_bytes = path.stat().st_size
    sha256 = hash_file(path, lambda done: tell("base", done, size_bytes))
    record: dict[str, Any] = {
        "architecture": header.architecture,
        "n_layer": header.n_layer,
        "n_embd": header.n_embd,
        "n_vocab": header.n_vocab,
        "sha256": sha256,
        "size_bytes": size_bytes,
    }
    if registry_name is None:
        record["file"] = str(path.absolute())
        registry_name = model_name(sha256)
    if registry_name is not None:
        record["registry"] = registry_name
    return record


def _put_adapter(
    source: Path, target: Path, base_path: Path, header: GgufHeader, outtype: str
) -> AdapterInfo:
    """Convert or copy one adapter to its place in the bundle, and check it against the base."""
    if source.is_dir():
        convert_adapter(source, base_path, target, outtype=outtype)
    elif source.is_file():
        _copy(source, target)
    else:
        raise InputFileError(
            f"The adapter {source} does not exist; expected a PEFT folder "
            "(adapter_config.json and adapter_model.safetensors) or an adapter GGUF."
        )
    try:
        info = read_adapter_gguf(target)
    except GgufFileError:
        if source.is_file():
            read_adapter_gguf(source)  # the same failure, naming the file the user knows
        raise
    check_adapter(info, header)
    return info


def _copy(source: Path, target: Path) -> None:
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        if is_disk_full(error):
            raise OutputFileError(
                f"Cannot copy the adapter {source} into the bundle: the disk is full. "
                "Free some space and try again."
            ) from error
        raise InputFileError(
            f"Cannot copy the adapter {source} into the bundle ({error.strerror}). "
            "Check that you may read it."
        ) from error


def _adapter_record(
    name: str, file: str, info: AdapterInfo, source: Path, note: Mapping[str, str]
) -> dict[str, Any]:
    return {
        "name": name,
        "file": file,
        "sha256": sha256_file(info.path),
        "size_bytes": Path(info.path).stat().st_size,
        "rank": info.rank,
        "alpha": info.alpha,
        "targets": list(info.targets),
        "source": note.get("source", source.resolve().name),
        "license": note.get("license", ""),
        "description": note.get("description", ""),
    }


def _measure(base_path: Path, adapters: Mapping[str, Path], tell: Progress) -> dict[str, Any]:
    """Typical divergences of each adapter over the neutral prompts (method.md section 7)."""
    from qaflora_edge.engine import Engine

    prompts = neutral_prompts()
    with Engine(base=base_path, adapters=adapters, n_ctx=_CALIBRATION_CTX) as engine:
        typical = engine.typical_divergence(
            prompts, lambda done, total: tell("calibration", done, total)
        )
    return {
        "typical": {
            name: {lens: [float(f"{value:.9g}") for value in values] for lens, values in by.items()}
            for name, by in typical.items()
        },
        "typical_prompts": {"sha256": prompts_sha256(prompts), "n_prompt": len(prompts)},
    }


def _dump(text: Mapping[str, Any]) -> str:
    return json.dumps(text, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


@contextlib.contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """Give a temporary folder that becomes `folder` when the block succeeds."""
    if folder.exists() or folder.is_symlink():
        raise OutputFileError(
            f"Cannot create the bundle {folder}: there is something of that name already. "
            "Choose another name, or remove it first."
        )
    temporary = folder.parent / f".tmp-{secrets.token_hex(6)}-{folder.name[:100]}"
    try:
        temporary.mkdir()
    except OSError as error:
        raise OutputFileError(
            f"Cannot create the bundle {folder}: the folder {folder.parent} does not take a new "
            f"folder ({error.strerror}). Create it, or choose one that you can write to."
        ) from error
    try:
        yield temporary
        os.rename(temporary, folder)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError) and is_disk_full(error):
            raise OutputFileError(
                f"Cannot create the bundle {folder}: the disk is full. "
                "Free some space and try again."
            ) from error
        raise
