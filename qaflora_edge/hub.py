"""Fetch a bundle folder or a single GGUF file from the Hugging Face Hub."""

import os
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from qaflora_edge.download import check_space, hub_errors, hub_progress
from qaflora_edge.errors import DownloadError, OutputFileError, RegistryError
from qaflora_edge.files import cache_dir, safe_join, sha256_file

Progress = Callable[[int, int], None]

BUNDLE_FILE = "bundle.json"
MAX_FILES = 500
MAX_BYTES = 64 << 30
LIST_TIMEOUT_SECONDS = 30
# What a bundle is made of; other files of its repository (pictures, training logs) stay there.
BUNDLE_SUFFIXES = (".json", ".gguf", ".md", ".txt")
BUNDLE_NAMES = ("LICENSE", "NOTICE")

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_REF = re.compile(
    rf"(?P<repo>{_NAME}/{_NAME})(?:/(?P<file>[^@\\]+\.gguf))?(?:@(?P<revision>[A-Za-z0-9._/-]+))?"
)


@dataclass(frozen=True)
class HubRef:
    """What a user names: `owner/name`, `owner/name/file.gguf`, each with `@revision` or without."""

    repo: str
    file: str | None
    revision: str | None


@dataclass(frozen=True)
class _HubFile:
    name: str
    size_bytes: int
    sha256: str | None


def parse_hub_ref(text: str) -> HubRef:
    """Read a Hub reference. Raises RegistryError when it has another form."""
    match = _REF.fullmatch(text)
    if match is None:
        raise RegistryError(
            f"Cannot use {text!r} as a Hugging Face Hub reference; expected owner/name, "
            "owner/name/file.gguf, or one of them with @revision. "
            "See 'qaflora models' for names that need no owner."
        )
    return HubRef(match["repo"], match["file"], match["revision"])


def hub_dir(ref: HubRef) -> Path:
    """Name the folder of the cache where a reference is kept once it was pulled."""
    name = ref.repo + (f"@{ref.revision}" if ref.revision else "")
    return cache_dir() / ("hub-files" if ref.file else "hub") / name.replace("/", "--")


def pulled_path(text: str) -> Path | None:
    """Give where a reference was pulled to in the cache, else None."""
    ref = parse_hub_ref(text)
    folder = hub_dir(ref)
    if ref.file:
        path = folder / PurePosixPath(ref.file).name
        return path if path.is_file() else None
    if (folder / BUNDLE_FILE).is_file():
        return folder
    files = list(folder.glob("*.gguf"))
    return files[0] if len(files) == 1 else None


def fetch_hub_bundle(
    ref: str,
    to: str | os.PathLike[str] | None = None,
    *,
    progress: Progress | None = None,
) -> Path:
    """Fetch a bundle (gives its folder) or a single GGUF (gives its file).

    `to` is a folder that does not exist yet or is empty; without it the cache is used, and what
    was pulled there before is given back without asking the Hub. The folder appears when all of
    its files are whole. Raises DownloadError when the Hub does not give them.
    """
    parsed = parse_hub_ref(ref)
    if to is None and (pulled := pulled_path(ref)):
        return pulled
    folder = hub_dir(parsed) if to is None else Path(to)
    # A single named file may join others; a bundle needs a folder of its own.
    is_taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if is_taken and not parsed.file:
        raise OutputFileError(
            f"Cannot pull {ref} to {folder}: it exists already and is not an empty folder. "
            "Name another folder with --to, or remove that one."
        )
    try:
        return _fetch(parsed, folder, progress)
    except DownloadError as error:
        raise DownloadError(
            f"Could not pull {ref}: {error} Check the name, the network, and for a private "
            "repository the environment variable HF_TOKEN; then try again."
        ) from error


def _fetch(ref: HubRef, folder: Path, progress: Progress | None) -> Path:
    commit, listed = _list_files(ref)
    wanted = _choose_files(ref, listed)
    total_bytes = sum(file.size_bytes for file in wanted)
    if len(wanted) > MAX_FILES or total_bytes > MAX_BYTES:
        raise DownloadError(
            f"it has {len(wanted)} files of {total_bytes} bytes together, over the limits of "
            f"{MAX_FILES} files and {MAX_BYTES} bytes."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    check_space(folder.parent, total_bytes, folder)
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=folder.parent) as temporary:
        fresh = Path(temporary) / "pulled"
        _download(ref, commit, wanted, fresh, total_bytes, progress)
        return _publish(fresh, folder, wanted)


def _list_files(ref: HubRef) -> tuple[str, list[_HubFile]]:
    from huggingface_hub import HfApi

    with hub_errors(f"the list of files of {ref.repo}"):
        info = HfApi().model_info(
            ref.repo, revision=ref.revision, files_metadata=True, timeout=LIST_TIMEOUT_SECONDS
        )
    return info.sha or "main", [_hub_file(sibling) for sibling in info.siblings or []]


def _hub_file(sibling: Any) -> _HubFile:
    sha256 = sibling.lfs.sha256 if sibling.lfs else None
    return _HubFile(sibling.rfilename, sibling.size or 0, sha256)


def _choose_files(ref: HubRef, listed: list[_HubFile]) -> list[_HubFile]:
    """Choose one GGUF file, or the files that a bundle is made of."""
    names = [file.name for file in listed]
    ggufs = [file for file in listed if file.name.endswith(".gguf")]
    if ref.file:
        wanted = [file for file in listed if file.name == ref.file]
    elif BUNDLE_FILE in names:
        return [file for file in listed if _belongs_to_bundle(PurePosixPath(file.name))]
    else:
        wanted = ggufs
    if len(wanted) == 1:
        return wanted
    shown = ", ".join(file.name for file in ggufs[:10]) or "none"
    raise DownloadError(
        f"expected {ref.file or BUNDLE_FILE + ' or exactly one .gguf file'} in {ref.repo}; it has "
        f"{len(names)} files, and its .gguf files are: {shown}. "
        "A file is named as owner/name/file.gguf."
    )


def _belongs_to_bundle(path: PurePosixPath) -> bool:
    return path.suffix.lower() in BUNDLE_SUFFIXES or path.name in BUNDLE_NAMES


def _download(
    ref: HubRef,
    commit: str,
    wanted: list[_HubFile],
    fresh: Path,
    total_bytes: int,
    progress: Progress | None,
) -> None:
    from huggingface_hub import hf_hub_download

    fresh.mkdir()
    finished_bytes = 0
    for file in wanted:

        def report(done_bytes: int, start_bytes: int = finished_bytes) -> None:
            if progress is not None:
                progress(min(start_bytes + done_bytes, total_bytes), total_bytes)

        safe_join(fresh, file.name)  # a repository's file names are not ours
        with hub_errors(f"{file.name} of {ref.repo}"):
            path = hf_hub_download(
                ref.repo,
                file.name,
                revision=commit,
                local_dir=fresh,
                tqdm_class=hub_progress(report),
            )
        _check(Path(path), file)
        finished_bytes += file.size_bytes
        report(0, finished_bytes)
    shutil.rmtree(fresh / ".cache", ignore_errors=True)


def _check(path: Path, file: _HubFile) -> None:
    size_bytes = path.stat().st_size
    if size_bytes != file.size_bytes:
        raise DownloadError(
            f"{file.name} came with {size_bytes} bytes, the Hub lists {file.size_bytes}."
        )
    if file.sha256 and (found := sha256_file(path)) != file.sha256:
        raise DownloadError(f"{file.name} came with sha256 {found}, the Hub lists {file.sha256}.")


def _publish(fresh: Path, folder: Path, wanted: list[_HubFile]) -> Path:
    is_bundle = any(file.name == BUNDLE_FILE for file in wanted)
    if is_bundle:
        if folder.is_dir():
            folder.rmdir()  # it is empty; Windows does not rename onto a folder
        os.replace(fresh, folder)
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / PurePosixPath(wanted[0].name).name
    os.replace(fresh / wanted[0].name, target)
    return target
