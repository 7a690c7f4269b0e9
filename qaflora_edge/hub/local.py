"""The Hub's cache on this machine, shared with other tools: what is in it, and removing that.

    models--OWNER--NAME/refs/REVISION          the commit that a branch or tag was last seen at
    models--OWNER--NAME/snapshots/COMMIT/FILE  a link to ../../blobs/HASH, or the file itself

The environment variables HF_HOME and HF_HUB_CACHE move it. Looking up imports none of the Hub's
library, which takes half a second: `qaflora run owner/name` would wait for it.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from qaflora_edge.errors import BundleError, OutputFileError, RegistryError
from qaflora_edge.files import read_input
from qaflora_edge.formats.bundle import BUNDLE_FILE, MAX_BUNDLE_BYTES, packed_files, parse_bundle
from qaflora_edge.formats.names import HubRef, parse_hub_ref
from qaflora_edge.peft.config import CONFIG_FILE

_COMMIT = re.compile(r"[0-9a-f]{40}")


def hub_cache_dir() -> Path:
    """Name the folder that the Hub's own library caches in."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def is_commit(revision: str) -> bool:
    """Tell whether a revision names one commit for ever."""
    return _COMMIT.fullmatch(revision) is not None


def cached_snapshot(ref: HubRef) -> Path | None:
    """Find the folder of a reference's files in the cache, complete or not."""
    repo_dir = hub_cache_dir() / f"models--{ref.repo.replace('/', '--')}"
    commit = ref.revision or "main"
    if not is_commit(commit):
        try:
            commit = (repo_dir / "refs" / commit).read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            return None
    snapshot = repo_dir / "snapshots" / commit
    return snapshot if is_commit(commit) and os.path.isdir(snapshot) else None


def pulled_path(text: str) -> Path | None:
    """Find a reference's files in the cache; None unless all are there.

    A bundle and a PEFT adapter are folders, anything else is one GGUF file.
    """
    ref = parse_hub_ref(text)
    snapshot = cached_snapshot(ref)
    if snapshot is None:
        return None
    if ref.file:
        path = snapshot / ref.file
        return path if os.path.isfile(path) else None
    if os.path.isfile(snapshot / BUNDLE_FILE):
        return snapshot if _is_whole_bundle(snapshot) else None
    if os.path.isfile(snapshot / CONFIG_FILE):
        return snapshot if any(snapshot.glob("adapter*.safetensors")) else None
    files = _names(snapshot, ".gguf")
    return snapshot / files[0] if len(files) == 1 else None


def _is_whole_bundle(snapshot: Path) -> bool:
    try:
        text = parse_bundle(read_input(snapshot / BUNDLE_FILE, MAX_BUNDLE_BYTES), BUNDLE_FILE)
    except (OSError, ValueError, BundleError):
        return False
    return all(os.path.isfile(snapshot / name) for name in packed_files(text))


def _names(folder: Path, end: str = "") -> list[str]:
    """List the files below a folder that end so."""
    paths = [Path(parent, name) for parent, _, names in os.walk(folder) for name in names]
    return sorted(path.relative_to(folder).as_posix() for path in paths if path.name.endswith(end))


def pulled() -> Iterator[tuple[str, Path, str]]:
    """Give everything complete in the cache: its reference, `pulled_path` of that, its commit.

    A commit is named by a branch or tag that was seen there, main before others. Of a commit that
    is no bundle, adapter or single GGUF file, every GGUF file is given.
    """
    for folder in sorted(hub_cache_dir().glob("models--*--*")):
        repo = folder.name.removeprefix("models--").replace("--", "/")
        refs = [*_names(folder / "refs"), "main"]
        named = {cached_snapshot(HubRef(repo, None, ref)): ref for ref in refs}
        for snapshot in sorted((folder / "snapshots").glob("*")):
            revision = named.get(snapshot, snapshot.name)
            for file in (None, *_names(snapshot, ".gguf")):
                ref = str(HubRef(repo, file, None if revision == "main" else revision))
                with contextlib.suppress(RegistryError):  # a folder of another name
                    if path := pulled_path(ref):
                        yield ref, path, snapshot.name
                        if file is None:
                            break


def cached_ref(path: Path) -> HubRef | None:
    """Give the pinned reference of a path in the cache, as `hf download` prints it; else None."""
    # A file of a snapshot is a link into blobs/: only its folder is resolved.
    place = Path(os.path.realpath(path.parent)) / path.name
    try:
        repo_dir, snapshots, commit, *file = place.relative_to(
            os.path.realpath(hub_cache_dir())
        ).parts
        owner, name = repo_dir.removeprefix("models--").split("--")
        ref = HubRef(f"{owner}/{name}", "/".join(file) or None, commit)
        is_ref = parse_hub_ref(str(ref)) == ref
    except (ValueError, RegistryError):
        return None
    return ref if is_ref and snapshots == "snapshots" and is_commit(commit) else None


def remove_commit(commit: str, path: Path) -> None:
    """Remove all files of a commit from the cache, and the blobs that no other commit needs.

    path  one of its files or its folder, for messages

    Raises OutputFileError when it is still there afterwards.
    """
    from huggingface_hub import scan_cache_dir

    scan_cache_dir(hub_cache_dir()).delete_revisions(commit).execute()
    if os.path.lexists(path):  # the library only logs what it cannot remove
        raise OutputFileError(
            f"Cannot remove {path}: it is still there. Check that you may change it and that no "
            "other program uses it; try again."
        )
