"""Where the base and the adapters of a new bundle come from: files here, a name, or the Hub."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from qaflora_edge.errors import (
    BundleError,
    DownloadError,
    GgufFileError,
    InputFileError,
    RegistryError,
)
from qaflora_edge.files import AnyPath, open_input, readable, what_is_at
from qaflora_edge.formats import registry
from qaflora_edge.formats.bundle import BUNDLE_FILE, BaseRecord
from qaflora_edge.formats.checksums import check_file
from qaflora_edge.formats.hub_ref import HubRef, from_address, parse_hub_ref
from qaflora_edge.hub.cache import cached_ref
from qaflora_edge.hub.models import fetch_model
from qaflora_edge.hub.pull import fetch_hub, fetch_pinned
from qaflora_edge.peft.files import check_no_part
from qaflora_edge.progress import Tell, TellCount
from qaflora_edge.settings import expanded

CARD_FILE = "README.md"
MAX_CARD_BYTES = 1 << 20


@dataclass(frozen=True)
class BaseSource:
    """A base's file here, and the registry name or the pinned Hub reference it was given by."""

    path: Path
    registry: str | None = None
    hub: str | None = None


@dataclass(frozen=True)
class AdapterSource:
    """An adapter's PEFT folder or GGUF here, its name, its licence, its pinned Hub reference."""

    path: Path
    name: str
    license: str = ""
    hub: str | None = None


def find_base(base: AnyPath, tell: Tell) -> BaseSource:
    """Find a base by its file, its registry name, or its Hub reference, which is fetched.

    Raises GgufFileError when it is none of them, DownloadError when the Hub does not give it.
    """
    path, name = _local(base), from_address(os.fspath(base))
    if os.path.isfile(path):
        cached = cached_ref(path)
        return BaseSource(path, hub=None if cached is None else str(cached))
    if name in registry.load_registry():
        pulled = registry.pulled_model(name)
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
    path, pinned = _fetch(name, tell)
    if not path.is_file():
        raise GgufFileError(
            f"The base {name} is a folder of files, expected one GGUF file. "
            "Name it as owner/name/file.gguf."
        )
    return BaseSource(path, hub=pinned)


def find_adapter(source: AnyPath, tell: Tell) -> AdapterSource:
    """Find an adapter by its folder or file, or by its Hub reference, which is fetched.

    Raises InputFileError when it is neither, DownloadError when the Hub does not give it.
    """
    path, name = _local(source), from_address(os.fspath(source))
    if os.path.exists(path):
        check_no_part(path)
        if cached := cached_ref(path):
            return AdapterSource(path, _name(cached), _card_license(path), str(cached))
        return AdapterSource(path, readable(path.resolve().name), _card_license(path))
    ref = _hub_ref(name)
    if ref is None or what_is_at(path) != "does not exist":
        raise InputFileError(
            f"The adapter {path} {what_is_at(path)}; expected a PEFT folder (adapter_config.json "
            "and adapter_model.safetensors), an adapter GGUF, or a Hub reference as owner/name."
        )
    path, pinned = _fetch(name, tell)
    if (path / BUNDLE_FILE).exists():
        raise InputFileError(
            f"The adapter {name} is a bundle, expected one adapter. "
            f"Name one of its files, as {ref.repo}/adapters/NAME.gguf."
        )
    return AdapterSource(path, _name(ref), _card_license(path), pinned)


def fetch_base(folder: Path, base: BaseRecord, progress: TellCount | None = None) -> Path:
    """Fetch the base of the bundle in a folder from where bundle.json says.

    Raises BundleError when it says only a file, ChecksumError when what came is another file,
    DownloadError when it does not come.
    """
    where = folder / BUNDLE_FILE
    if base.registry in registry.load_registry():
        path = fetch_model(str(base.registry), progress=progress)
    elif base.hub:
        path = fetch_hub(base.hub, progress=progress)
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


def _name(ref: HubRef) -> str:
    return ref.repo.partition("/")[2]


def _local(text: AnyPath) -> Path:
    """A path as given, or with the home folder for the ~ that a shell leaves behind NAME=."""
    path = Path(text)
    if not os.path.exists(path) and path.parts[:1] and path.parts[0].startswith("~"):
        return expanded(str(path))
    return path


def _card_license(path: Path) -> str:
    """The licence that the card of an adapter's folder states in its head, else ""."""
    try:
        with open_input(path / CARD_FILE) as file:
            card = file.read(MAX_CARD_BYTES).decode("utf-8", "replace")
    except OSError:
        return ""
    head = re.match(r"---\s*\n(.*?)\n---", card, re.DOTALL)
    stated = head and re.search(r"^license:[ \t]*['\"]?([\w.+-]+)", head[1], re.MULTILINE)
    return stated[1] if stated else ""


def _hub_ref(text: str) -> HubRef | None:
    """Read a Hub reference; None when it has another form, such as folder/file.gguf."""
    if text.endswith(".gguf") and text.count("/") < 2:
        return None
    try:
        return parse_hub_ref(text)
    except RegistryError:
        return None


def _fetch(name: str, tell: Tell) -> tuple[Path, str]:
    try:
        return fetch_pinned(name, progress=lambda done, total: tell(name, done, total))
    except DownloadError as error:
        raise DownloadError(f"There is no file or folder {name} here. {error}") from error
