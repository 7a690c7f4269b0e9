"""Bases and adapters for a bundle: found by file, name or Hub reference, put into it, recorded."""

import contextlib
import os
import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qaflora_edge.bundles.open import recorded_base
from qaflora_edge.convert.adapter import convert_adapter
from qaflora_edge.errors import (
    BundleError,
    DownloadError,
    GgufFileError,
    InputFileError,
    RegistryError,
    os_errors,
)
from qaflora_edge.files import (
    AnyPath,
    atomic_path,
    open_input,
    readable,
    sha256_file,
    what_is_at,
)
from qaflora_edge.formats.adapter import AdapterInfo, check_adapter, read_adapter, read_adapter_gguf
from qaflora_edge.formats.bundle import (
    BUNDLE_FILE,
    MAX_ADAPTERS,
    NAME_PATTERN,
    NAME_RULE,
    BaseRecord,
    read_bundle_text,
)
from qaflora_edge.formats.checksums import check_file, hash_file
from qaflora_edge.formats.gguf import GgufHeader
from qaflora_edge.formats.names import (
    HubRef,
    from_address,
    load_registry,
    model_name,
    parse_hub_ref,
    pulled_model,
)
from qaflora_edge.hub.fetch import fetch_hub, fetch_model
from qaflora_edge.hub.local import all_here, cached_ref
from qaflora_edge.peft.folder import check_no_part
from qaflora_edge.progress import Tell, TellCount
from qaflora_edge.settings import expanded

CARD_FILE = "README.md"
MAX_CARD_BYTES = 1 << 20
MAX_NAME_CHARS = 200  # of a base's own name

_DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)


@dataclass(frozen=True)
class BaseSource:
    """A base's file here, and the registry name or the pinned Hub reference it was given by."""

    path: Path
    registry: str | None = None
    hub: str | None = None


@dataclass(frozen=True)
class AdapterSource:
    """An adapter's PEFT folder or GGUF here, its name, its pinned Hub reference."""

    path: Path
    name: str
    hub: str | None = None


# Finding


def find_base(base: AnyPath) -> BaseSource:
    """Find a base by its file, its registry name, or its Hub reference, which is fetched.

    Raises GgufFileError when it is none of them, DownloadError when the Hub does not give it.
    """
    path, name = _local(base), from_address(os.fspath(base))
    if os.path.isfile(path):
        cached = cached_ref(path)
        return BaseSource(path, hub=None if cached is None else str(cached))
    if name in load_registry():
        pulled = pulled_model(name)
        if pulled is None:
            raise GgufFileError(
                f"The base {name} is in the registry but not on this machine; "
                f"fetch it with `qaflora pull {name}`."
            )
        return BaseSource(pulled, registry=name)
    if what_is_at(path) != "does not exist" or _hub_ref(name) is None:
        raise GgufFileError(
            f"The base {path} {what_is_at(path)}; give a GGUF file, the name of a model from "
            "`qaflora models` that was pulled, or a Hub reference as owner/name/file.gguf."
        )
    path, pinned = _fetch(name)
    if not path.is_file():
        raise GgufFileError(
            f"The base {name} is a folder of files, expected one GGUF file. "
            "Name it as owner/name/file.gguf."
        )
    return BaseSource(path, hub=pinned)


def find_adapter(source: AnyPath) -> AdapterSource:
    """Find an adapter by its folder or file, or by its Hub reference, which is fetched.

    Raises InputFileError when it is neither, DownloadError when the Hub does not give it.
    """
    path = _local(source)
    if os.path.exists(path):
        ref = cached_ref(path)
        check_no_part(path)
        if ref is None:
            return AdapterSource(path, readable(path.resolve().name))
        return AdapterSource(path, _name(ref), str(ref))
    name = from_address(os.fspath(source))
    ref = _hub_ref(name)
    if ref is None or what_is_at(path) != "does not exist":
        raise InputFileError(
            f"The adapter {path} {what_is_at(path)}; expected a PEFT folder (adapter_config.json "
            "and adapter_model.safetensors), an adapter GGUF, or a Hub reference as owner/name."
        )
    path, pinned = _fetch(name)
    if (path / BUNDLE_FILE).exists():
        raise InputFileError(
            f"The adapter {name} is a bundle, expected one adapter. "
            f"Name one of its files, as {ref.repo}/adapters/NAME.gguf."
        )
    return AdapterSource(path, _name(ref), pinned)


def fetch_base(folder: Path, base: BaseRecord, progress: TellCount | None = None) -> Path:
    """Fetch the base of the bundle in a folder from where bundle.json says.

    Raises BundleError when it says only a file, ChecksumError when another file came,
    DownloadError when it does not come.
    """
    where = folder / BUNDLE_FILE
    if base.registry in load_registry():
        path = fetch_model(str(base.registry), progress=progress)
    elif base.hub:
        path = fetch_hub(base.hub)
    else:
        raise BundleError(
            f"Cannot fetch the base of {where}: it says neither base.registry nor base.hub; "
            f"expected one of them. Find the file with the SHA-256 {base.sha256} and name it with "
            "`qaflora bundle base`."
        )
    check_file(
        path,
        what="The base",
        sha256=base.sha256,
        size_bytes=base.size_bytes,
        recorded_in=str(where),
        advice="Ask the owner of the bundle for its base.",
    )
    return path


def bundles_on(base: Path) -> list[str]:
    """Name the bundles here that need a base."""
    names = []
    for here in all_here():
        if here.kind == "bundle":
            with contextlib.suppress(BundleError):
                path = recorded_base(here.path, read_bundle_text(here.path).base)
                if path is not None and path.samefile(base):
                    names.append(here.name)
    return names


def _name(ref: HubRef) -> str:
    return ref.repo.partition("/")[2]


def _local(text: AnyPath) -> Path:
    """Make a path; the ~ that a shell leaves after NAME= becomes the home folder."""
    path = Path(text)
    if not os.path.exists(path) and path.parts[:1] and path.parts[0].startswith("~"):
        return expanded(str(path))
    return path


def _card_license(path: Path) -> str:
    """Read the licence that the card of an adapter's folder states in its head, else ""."""
    try:
        with open_input(path / CARD_FILE) as file:
            card = file.read(MAX_CARD_BYTES).decode("utf-8", "replace")
    except OSError:
        return ""
    head = re.match(r"---\s*\n(.*?)\n---", card, re.DOTALL)
    stated = head and re.search(r"^license:[ \t]*['\"]?([\w.+-]+)", head[1], re.MULTILINE)
    return stated[1] if stated else ""


def _hub_ref(text: str) -> HubRef | None:
    """Parse a Hub reference; None when it has another form, such as folder/file.gguf."""
    if text.endswith(".gguf") and text.count("/") < 2:
        return None
    try:
        return parse_hub_ref(text)
    except RegistryError:
        return None


def _fetch(name: str) -> tuple[Path, str]:
    try:
        path = fetch_hub(name)
    except DownloadError as error:
        raise DownloadError(f"There is no file or folder {name} here. {error}") from error
    return path, str(cached_ref(path))


# Putting into a bundle


def check_names(names: Sequence[str], new: Collection[str] | None = None) -> None:
    """Check that names can be adapters of one bundle. Raises BundleError.

    new  names that the bundle lacks yet; None: all of them
    """
    seen: set[str] = set()
    for name in names:
        if not NAME_PATTERN.fullmatch(name):
            raise BundleError(f"The adapter name {name!r} cannot be used; expected {NAME_RULE}.")
        if _DEVICE.fullmatch(name) and (new is None or name in new):
            raise BundleError(
                f"The adapter name {name!r} cannot be used: files of that name are devices on "
                "Windows; expected another."
            )
        if name.lower() in seen:
            raise BundleError(
                f"The adapter name {name!r} is taken already (capital letters make no difference: "
                "names become file names); give each adapter a name of its own."
            )
        seen.add(name.lower())
    if len(names) > MAX_ADAPTERS:
        raise BundleError(
            f"{len(names)} adapters are too many for one bundle; expected at most {MAX_ADAPTERS}."
        )


def put_adapter(
    source: AdapterSource, target: Path, header: GgufHeader, outtype: str, note: Mapping[str, str]
) -> dict[str, Any]:
    """Convert or copy one adapter to its place in a bundle, and check it against the base.

    header   of the base
    note     may have source, license and description
    returns  what bundle.json says of it, name and file apart
    """
    if source.path.is_dir():  # its values are checked on their way
        convert_adapter(source.path, header.path, target, outtype=outtype, name=source.name)
        info = read_adapter_gguf(target)
        check_adapter(info, header)
    else:  # messages name the file that the user knows
        info = read_adapter(source.path, header)
        copy_file(source.path, target)
    return _adapter_record(replace(info, path=target), source, note)


def copy_file(source: Path, target: Path) -> None:
    """Copy an adapter file, whole or not at all."""
    failure = f"Cannot copy the adapter {source} into the bundle"
    with (
        os_errors(InputFileError, failure, "Check that you may read it."),
        open_input(source) as file,
        atomic_path(target) as temporary,
        temporary.open("wb") as copy,
    ):
        shutil.copyfileobj(file, copy, 1 << 20)


def _adapter_record(
    info: AdapterInfo, source: AdapterSource, note: Mapping[str, str]
) -> dict[str, Any]:
    record = {
        "sha256": sha256_file(info.path),
        "size_bytes": info.path.stat().st_size,
        "rank": info.rank,
        "alpha": info.alpha,
        "targets": list(info.targets),
        "source": note.get("source", source.hub or source.name),
        "license": note.get("license", _card_license(source.path)),
        "description": note.get("description", ""),
        "trained_on": info.trained_on,
        "hub": source.hub,
    }
    return {key: value for key, value in record.items() if value is not None}


def base_record(source: BaseSource, header: GgufHeader, tell: Tell) -> dict[str, Any]:
    """Hash a base, and say of it what bundle.json says."""
    path = source.path
    size_bytes = path.stat().st_size
    sha256 = hash_file(path, lambda done: tell("base", done, size_bytes))
    is_file = source.registry is None and source.hub is None
    record: dict[str, Any] = {
        "architecture": header.architecture,
        "n_layer": header.n_layer,
        "n_embd": header.n_embd,
        "n_vocab": header.n_vocab,
        "sha256": sha256,
        "size_bytes": size_bytes,
        "name": None if header.name is None else header.name[:MAX_NAME_CHARS],
        "file": recordable(path.absolute()) if is_file else None,
        "registry": source.registry or model_name(sha256),
        "hub": source.hub,
    }
    return {key: value for key, value in record.items() if value is not None}


def recordable(path: Path) -> str:
    """Give a path as text of bundle.json. Raises BundleError when it is no text."""
    if readable(str(path)) != str(path):
        raise BundleError(
            f"Cannot record the base {path} in {BUNDLE_FILE}: its path is not UTF-8, and JSON "
            "holds nothing else; expected a path that is. Rename the file or its folder, or give "
            "the base by a name of `qaflora models`."
        )
    return path.as_posix()
