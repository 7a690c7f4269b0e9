"""Bases and adapters for a bundle: found by file, name or Hub reference, put into it, recorded."""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qaflora_edge.config import expanded
from qaflora_edge.convert.adapter import convert_adapter
from qaflora_edge.errors import (
    BundleError,
    DownloadError,
    GgufFileError,
    InputFileError,
    RegistryError,
)
from qaflora_edge.files import AnyPath, atomic_path, readable, what_is_at
from qaflora_edge.formats.adapter import read_adapter
from qaflora_edge.formats.base import RECORDED
from qaflora_edge.formats.bundle import NAME_PATTERN, NAME_RULE, BaseRecord, safe_join
from qaflora_edge.formats.gguf import GgufHeader, read_gguf_header
from qaflora_edge.formats.inputs import Json, Object, checksum, sha256_file
from qaflora_edge.formats.names import HubRef, load_registry, parse_hub_ref, pulled_model
from qaflora_edge.hub import fetch_hub, fetch_model, hub_cache_dir
from qaflora_edge.peft.folder import check_no_part
from qaflora_edge.progress import Tell, TellCount, silent
from qaflora_edge.weighing.strategy import strategies


@dataclass(frozen=True)
class AdapterSource:
    """An adapter's PEFT folder or GGUF here, its name, its pinned Hub reference."""

    path: Path
    name: str
    hub: str | None = None


def find_base(base: AnyPath) -> tuple[Path, dict[str, str]]:
    """Find a base by its file, its registry name, or its Hub reference, which is fetched.

    Returns its file and the field of bundle.json by which it is found: file, registry or hub.
    Raises GgufFileError when it is none of them, DownloadError when the Hub does not give it.
    """
    name = os.fspath(base)
    path = expanded(os.fspath(base))
    if os.path.isfile(path):
        return path, {"file": path.absolute().as_posix()}
    if name in load_registry():
        pulled = pulled_model(name)
        if pulled is None:
            raise GgufFileError(
                f"The base {name} is in the registry but not on this machine; "
                f"fetch it with `qaflora pull {name}`."
            )
        return pulled, {"registry": name}
    if _is_hub_ref(name):
        path, pinned = _fetch(name)
        if path.is_file():
            return path, {"hub": pinned}
    raise GgufFileError(
        f"The base {path} {what_is_at(path)}; give a GGUF file, the name of a model from "
        "`qaflora models` that was pulled, or a Hub reference as owner/name/file.gguf."
    )


def find_adapter(source: AnyPath) -> AdapterSource:
    """Find an adapter by its folder or file, or by its Hub reference, which is fetched.

    Raises InputFileError when it is neither, DownloadError when the Hub does not give it.
    """
    name = os.fspath(source)
    path = expanded(os.fspath(source))
    if os.path.exists(path):
        check_no_part(path)
        return AdapterSource(path, readable(path.resolve().name))
    if not _is_hub_ref(name):
        raise InputFileError(
            f"The adapter {path} {what_is_at(path)}; expected a PEFT folder (adapter_config.json "
            "and adapter_model.safetensors), an adapter GGUF, or a Hub reference as owner/name."
        )
    path, pinned = _fetch(name)
    repo = parse_hub_ref(name).repo
    return AdapterSource(path, repo.partition("/")[2], pinned)


def fetch_base(folder: Path, base: BaseRecord, progress: TellCount = silent) -> Path:
    """Fetch the base of the bundle in a folder from where bundle.json says.

    Raises BundleError when it says only a file, DownloadError when it does not come.
    """
    if base.registry in load_registry():
        return fetch_model(str(base.registry), progress=progress)
    if base.hub:
        return fetch_hub(base.hub)
    raise BundleError(
        f"Cannot fetch the base of the bundle {folder}: it says neither base.registry nor "
        f"base.hub; expected one of them. Find the file with the SHA-256 {base.sha256} and name it "
        "with `qaflora bundle base`."
    )


def _is_hub_ref(text: str) -> bool:
    """Tell a Hub reference from a path that is not there, such as folder/file.gguf."""
    if text.endswith(".gguf") and text.count("/") < 2:
        return False
    try:
        return bool(parse_hub_ref(text))
    except RegistryError:
        return False


def _fetch(name: str) -> tuple[Path, str]:
    try:
        path = fetch_hub(name)
    except DownloadError as error:
        raise DownloadError(f"There is no file or folder {name} here. {error}") from error
    # The Hub's library keeps models--OWNER--NAME/snapshots/COMMIT/FILE.
    commit, *file = path.relative_to(hub_cache_dir()).parts[2:]
    repo = parse_hub_ref(name).repo
    return path, str(HubRef(repo, "/".join(file) or None, commit))


def check_new_name(name: str) -> None:
    """Check that a name is no strategy's: MODEL:base asks for the base. Raises BundleError."""
    if name.lower() in {strategy.name for strategy in strategies()}:
        raise BundleError(
            f"The adapter name {name!r} is that of a strategy; expected another name. Give it as "
            "NAME=PATH, or rename the file."
        )


def check_names(names: Sequence[str]) -> None:
    """Check that names can be adapters, and so files, of one bundle. Raises BundleError."""
    seen = set()
    for name in names:
        if not NAME_PATTERN.fullmatch(name):
            raise BundleError(f"The adapter name {name!r} cannot be used; expected {NAME_RULE}.")
        if name.lower() in seen:
            raise BundleError(
                f"The adapter name {name!r} is taken already (capital letters make no difference: "
                "names become file names); give each adapter a name of its own."
            )
        seen.add(name.lower())


def put_adapters(
    folder: Path,
    raw: Object,
    pairs: Sequence[tuple[str, AnyPath]],
    header: GgufHeader,
    outtype: str,
    tell: Tell,
) -> None:
    """Convert or copy adapters into a bundle, check them against the base, and record them.

    raw     bundle.json; its adapters are changed
    pairs   name and source of each; all are found before the first is converted
    header  of the base

    Raises BundleError when a file's place is another adapter's. What a killed command left goes.
    """
    sources = [find_adapter(path) for _, path in pairs]
    safe_join(folder, "adapters").mkdir(exist_ok=True)
    for name, _ in pairs:
        check_new_name(name)
    for done, ((name, _), source) in enumerate(zip(pairs, sources, strict=True)):
        tell("Converting the adapters", done, len(pairs))
        file = f"adapters/{name}.gguf"
        for other in raw["adapters"]:
            if other["file"].lower() == file.lower():
                raise BundleError(
                    f"Cannot put an adapter {name} into {folder}: the file {file} is that of the "
                    f"adapter {other['name']}. Choose another name."
                )
        raw["adapters"].append({"name": name, "file": file})
        raw["adapters"][-1] |= _put_adapter(source, safe_join(folder, file), header, outtype)
    tell("Converting the adapters", len(pairs), len(pairs))


def _put_adapter(source: AdapterSource, target: Path, header: GgufHeader, outtype: str) -> Json:
    if source.path.is_dir():
        convert_adapter(source.path, header, target, outtype=outtype, name=source.name)
        info = read_adapter(read_gguf_header(target), header)
    else:  # messages name the file that the user knows
        info = read_adapter(read_gguf_header(source.path), header)
        with atomic_path(target) as temporary:
            shutil.copyfile(source.path, temporary)
    record = {
        "sha256": sha256_file(target),
        "size_bytes": target.stat().st_size,
        "rank": info.rank,
        "alpha": info.alpha,
        "targets": list(info.targets),
        "source": source.hub or source.name,
        "license": "",
        "description": "",
    }
    if source.hub:
        record["hub"] = source.hub
    return record


def base_record(header: GgufHeader, recorded: Mapping[str, str]) -> Json:
    """Hash a base, and say of it what bundle.json says; recorded is find_base's."""
    sha256 = checksum(header.path)
    record = {key: getattr(header, key) for key in RECORDED}
    record["sha256"] = sha256
    record["size_bytes"] = header.size_bytes
    if header.name:
        record["name"] = header.name
    for model in load_registry().values():
        if model.sha256 == sha256:
            record.setdefault("registry", model.name)
    record |= recorded
    return record
