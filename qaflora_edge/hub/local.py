"""What is on this machine, by name: bundles, bases and adapters; removing what was pulled.

What was pulled from the Hub lies in the Hub's own cache, which other tools share. The Hub's library
finds it there. It is imported when a reference is looked up, which takes a moment.
"""

import contextlib
import glob
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qaflora_edge.errors import (
    BundleError,
    InputFileError,
    OutputFileError,
    QafloraError,
    RegistryError,
    os_errors,
)
from qaflora_edge.formats.bundle import BUNDLE_FILE, BaseRecord, packed_files, read_bundle_text
from qaflora_edge.formats.names import (
    CONFIG_FILE,
    HubRef,
    load_registry,
    local_path,
    parse_hub_ref,
    pulled_model,
)
from qaflora_edge.settings import bundle_places

# --- bundles by name ----------------------------------------------------------------------------


def is_bundle(folder: Path) -> bool:
    """Tell whether a folder looks like a bundle; nothing is read."""
    return os.path.isfile(folder / BUNDLE_FILE)


def bundles_in(folder: Path) -> list[Path]:
    """List the bundles directly inside a folder; none when it cannot be read."""
    try:
        return [path.parent for path in sorted(folder.glob(f"*/{BUNDLE_FILE}"))]
    except (OSError, ValueError):
        return []


def named_bundles() -> dict[str, Path]:
    """Map names to the bundles in the places of the setting `bundles`; the first one wins.

    Raises SettingsError when the settings file cannot be read.
    """
    by_name: dict[str, Path] = {}
    for place in bundle_places():
        for folder in [place] if is_bundle(place) else bundles_in(place):
            by_name.setdefault(folder.name, folder)
    return by_name


def pulled_bundles() -> dict[str, Path]:
    """Map owner/name to every complete bundle that `qaflora pull` has fetched."""
    return {name: path for name, path, _ in pulled() if is_bundle(path)}


# --- the Hub's cache ----------------------------------------------------------------------------


def hub_cache_dir() -> Path:
    """Name the folder that the Hub's own library caches in."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def pulled_path(text: str) -> Path | None:
    """Find a reference's files in the cache; None unless all are there.

    A bundle and a PEFT adapter are folders, anything else is one GGUF file.
    """
    ref = parse_hub_ref(text)
    from huggingface_hub import snapshot_download

    needed = [glob.escape(ref.file)] if ref.file else [BUNDLE_FILE, CONFIG_FILE]
    try:
        folder = snapshot_download(
            ref.repo, revision=ref.revision, allow_patterns=needed, local_files_only=True
        )
    except (ValueError, OSError):  # the library's errors for what is not here
        return None
    return whole_path(Path(folder), ref.file)


def recorded_base(folder: Path, base: BaseRecord) -> Path | None:
    """Find the base where bundle.json says, else where `qaflora pull` puts it, else None."""
    with contextlib.suppress(ValueError, OSError):  # a name that no file can have
        if base.file and (folder / base.file).is_file():  # an absolute file stays absolute
            return folder / base.file
    if base.hub and (pulled := pulled_path(base.hub)):
        return pulled
    return pulled_model(base.registry) if base.registry else None


def whole_path(folder: Path, file: str | None) -> Path | None:
    """Find a file, bundle, PEFT adapter or only GGUF in a folder; None unless it is whole."""
    if file:
        return folder / file if os.path.isfile(folder / file) else None
    if is_bundle(folder):
        try:
            names = packed_files(read_bundle_text(folder))
        except BundleError:
            return None
        return folder if all(os.path.isfile(folder / name) for name in names) else None
    if os.path.isfile(folder / CONFIG_FILE):
        return folder if any(folder.glob("adapter*.safetensors")) else None
    files = _ggufs(folder)
    return folder / files[0] if len(files) == 1 else None


def _ggufs(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.gguf"))


def pulled() -> Iterator[tuple[str, Path, str]]:
    """Give everything complete in the cache: its reference, its path, its commit.

    A commit is named by a branch or tag that was seen there, main before others. Of a commit that
    is no bundle, adapter or single GGUF file, every GGUF file is given.
    """
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = sorted(scan_cache_dir(hub_cache_dir()).repos, key=lambda repo: repo.repo_id)
    except CacheNotFound:
        return
    for repo in repos:
        for kept in sorted(repo.revisions, key=lambda revision: revision.commit_hash):
            names = sorted(kept.refs, key=lambda name: (name != "main", name))
            revision = names[0] if names else kept.commit_hash
            whole = whole_path(kept.snapshot_path, None)
            for file in [None] if whole else _ggufs(kept.snapshot_path):
                ref = HubRef(repo.repo_id, file, None if revision == "main" else revision)
                with contextlib.suppress(RegistryError):  # a repository without an owner
                    parse_hub_ref(str(ref))
                    yield str(ref), whole or kept.snapshot_path / str(file), kept.commit_hash


# --- all that is here ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Here:
    """A bundle, a base or an adapter on this machine.

    name    by which a command takes it
    commit  of the Hub's repository that it was pulled from, "" for others
    """

    kind: str
    name: str
    path: Path
    is_pulled: bool = False
    commit: str = ""

    @property
    def size_bytes(self) -> int:
        """Bytes of its files; a bundle's base is another entry."""
        files = self.path.rglob("*") if self.path.is_dir() else [self.path]
        return sum(path.stat().st_size for path in files if path.is_file())


def all_here() -> list[Here]:
    """List bundles of the working folder, the setting `bundles` and the Hub; then the rest."""
    bundles = {str(path): Path(path) for path in bundles_in(Path())}
    for name, path in named_bundles().items():
        bundles.setdefault(name, path)  # those of the working folder win
    first = [Here("bundle", name, path.absolute()) for name, path in bundles.items()]
    rest = []
    for model in load_registry().values():
        if place := local_path(model):
            rest.append(Here("base", model.name, place, is_pulled=True))
    for name, path, commit in pulled():
        here = Here(_kind(path), name, path, True, commit)
        if here.kind == "bundle":
            first.append(here)
        else:
            rest.append(here)
    return first + rest


def _kind(path: Path) -> str:
    if path.is_dir():
        return "bundle" if is_bundle(path) else "adapter"
    from qaflora_edge.formats.gguf import read_gguf_header

    try:
        is_adapter = read_gguf_header(path).metadata.get("general.type") == "adapter"
    except QafloraError:
        return "file"
    return "adapter" if is_adapter else "base"


def find_pulled(name: str) -> list[Here]:
    """Find what was pulled under a name, and after it the other files of its commit.

    Raises InputFileError when nothing was.
    """
    everything = all_here()
    for here in everything:
        if here.name == name and here.is_pulled:
            others = [other for other in everything if other.commit == here.commit != ""]
            return [here, *(other for other in others if other is not here)]
    raise InputFileError(
        f"Cannot remove {name}: nothing was pulled under this name; expected one that `qaflora "
        "list` shows as pulled. Delete files and folders of your own yourself."
    )


def remove_pulled(here: Here) -> None:
    """Remove what was pulled, with its whole commit. Raises OutputFileError."""
    from huggingface_hub import scan_cache_dir

    advice = "Check that you may change it and that no other program uses it; try again."
    with os_errors(OutputFileError, f"Cannot remove {here.path}", advice):
        if not here.commit:
            here.path.unlink()
            return
        # Blobs that other commits need stay.
        scan_cache_dir(hub_cache_dir()).delete_revisions(here.commit).execute()
    if os.path.lexists(here.path):  # the library only logs what it cannot remove
        raise OutputFileError(f"Cannot remove {here.path}: it is still there. {advice}")
