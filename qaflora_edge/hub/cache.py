"""The Hub's cache on this machine, shared with other tools: looked up, never written here.

    models--OWNER--NAME/refs/REVISION          the commit that a branch or tag was last seen at
    models--OWNER--NAME/snapshots/COMMIT/FILE  a link to ../../blobs/HASH, or the file itself

The environment variables HF_HOME and HF_HUB_CACHE move it, as for every tool that uses it.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from qaflora_edge.errors import BundleError, RegistryError
from qaflora_edge.files import read_input
from qaflora_edge.formats.bundle import (
    BUNDLE_FILE,
    MAX_BUNDLE_BYTES,
    packed_files,
    parse_bundle,
)
from qaflora_edge.formats.hub_ref import HubRef, parse_hub_ref
from qaflora_edge.formats.json_text import read_json_object
from qaflora_edge.peft import mlx
from qaflora_edge.peft.config import CONFIG_FILE
from qaflora_edge.peft.files import INDEX_FILE, MAX_INDEX_BYTES, WEIGHTS_FILE

_COMMIT = re.compile(r"[0-9a-f]{40}")


def hub_cache_dir() -> Path:
    """Name the folder that the Hub's own library caches in."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def is_commit(revision: str) -> bool:
    """Tell whether a revision names one commit for ever."""
    return _COMMIT.fullmatch(revision) is not None


def cached_snapshot(ref: HubRef) -> Path | None:
    """The folder of a reference's files in the cache, whole or not; None when there is none."""
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
    """Where a reference's files are, when all of them are here; else None.

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
        return snapshot if _is_whole_peft(snapshot) else None
    files = _names(snapshot, ".gguf")
    path = snapshot / files[0] if len(files) == 1 else snapshot
    return path if os.path.isfile(path) else None


def _names(folder: Path, end: str = "") -> list[str]:
    """The files below a folder; os.walk passes over one that is removed meanwhile, rglob raises."""
    walk = os.walk(folder)
    paths = [Path(parent, name) for parent, _, names in walk for name in names]
    return sorted(path.relative_to(folder).as_posix() for path in paths if path.name.endswith(end))


def pulled() -> Iterator[tuple[Path, str, Path]]:
    """What is here whole: its repository's folder, its reference, and `pulled_path` of that.

    Every commit is named by a branch or tag where one was seen there, main before others. Of one
    that is no bundle, adapter or single GGUF file, every GGUF file is given.
    """
    for folder in sorted(hub_cache_dir().glob("models--*--*")):
        repo = folder.name.removeprefix("models--").replace("--", "/")
        refs = [*_names(folder / "refs"), "main"]
        named = {cached_snapshot(HubRef(repo, None, ref)): ref for ref in refs}
        for snapshot in sorted((folder / "snapshots").glob("*")):
            revision = named.get(snapshot, snapshot.name)
            for file in (None, *_names(snapshot, ".gguf")):
                ref = str(HubRef(repo, file, None if revision == "main" else revision))
                with contextlib.suppress(RegistryError):
                    if path := pulled_path(ref):
                        yield folder, ref, path
                        if file is None:
                            break


def cached_ref(path: Path) -> HubRef | None:
    """The pinned reference of what lies in the Hub's cache, as `hf download` prints its path.

    None for any other path, and for one below a snapshot that no reference names.
    """
    # A file of a snapshot is a link into blobs/: only what it lies in is resolved.
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


def _is_whole_bundle(snapshot: Path) -> bool:
    try:
        text = parse_bundle(read_input(snapshot / BUNDLE_FILE, MAX_BUNDLE_BYTES), BUNDLE_FILE)
    except (OSError, ValueError, BundleError):
        return False
    return all(os.path.isfile(snapshot / name) for name in packed_files(text))


def _is_whole_peft(snapshot: Path) -> bool:
    if any(os.path.isfile(snapshot / name) for name in (WEIGHTS_FILE, mlx.WEIGHTS_FILE)):
        return True
    try:
        index = read_json_object(read_input(snapshot / INDEX_FILE, MAX_INDEX_BYTES))
        shards = index.get("weight_map")
    except (OSError, ValueError):
        return False
    return isinstance(shards, dict) and all(
        isinstance(name, str) and os.path.isfile(snapshot / name) for name in shards.values()
    )
