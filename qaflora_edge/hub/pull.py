"""Fetch a bundle, an adapter or a single GGUF file from the Hugging Face Hub.

Without a folder of the user's it goes to the Hub's own cache, which other tools share, and is used
there. A file gets its name when it is whole; what is whole is not fetched again.
"""

import glob
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha1
from pathlib import Path, PurePosixPath

from qaflora_edge.errors import DownloadError, OutputFileError
from qaflora_edge.files import AnyPath, cache_lock, cut_name, safe_join, sha256_file
from qaflora_edge.formats.bundle import (
    BUNDLE_FILE,
    MAX_BUNDLE_BYTES,
    BundleText,
    packed_files,
    parse_bundle,
)
from qaflora_edge.formats.hub_ref import HubRef, parse_hub_ref
from qaflora_edge.hub.cache import cached_snapshot, hub_cache_dir, pulled_path
from qaflora_edge.hub.client import (
    HubFile,
    HubListing,
    advice,
    hub_errors,
    hub_progress,
    list_files,
)
from qaflora_edge.hub.download import check_space, read_chunks
from qaflora_edge.peft.config import CONFIG_FILE
from qaflora_edge.peft.files import INDEX_FILE, PICKLES, WEIGHTS_FILE
from qaflora_edge.progress import TellBytes, TellCount

MAX_FILES = 500
MAX_BYTES = 64 << 30
# Fetched beside what a bundle or an adapter is made of.
DOCUMENTS = ("README.md", "LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE")
_PARTIAL = re.compile(r"\.(.*)\.[0-9a-f]{12}\.partial", re.DOTALL)  # the folder's name, the commit


def fetch_hub(
    ref: str, to: AnyPath | None = None, *, update: bool = False, progress: TellCount | None = None
) -> Path:
    """Fetch a bundle or a PEFT adapter (gives its folder), or a single GGUF (gives its file).

    to      a folder that does not exist yet or is empty, of a named GGUF any folder; without it
            the Hub's cache; of what was pulled there before the Hub is asked no more than whether
            one GGUF is all
    update  ask the Hub even so, for the newest commit of the branch

    Raises DownloadError when the Hub does not give it, BundleError for a broken bundle.json.
    """
    parsed = parse_hub_ref(ref)
    try:
        pulled = None if to is not None or update else pulled_path(ref)
        if pulled is not None and _is_all(parsed, pulled):
            return pulled
        if to is not None:
            _check_free(ref, parsed, Path(to))
            return _fetch_into(parsed, list_files(parsed), Path(to), progress)
        return _fetch(parsed, list_files(parsed), None, progress)
    except DownloadError as error:
        raise DownloadError(f"Could not pull {ref}: {error}") from error


def fetch_pinned(ref: str, *, progress: TellCount | None = None) -> tuple[Path, str]:
    """Fetch as fetch_hub does; give the path, and the reference with the commit it means here."""
    path = fetch_hub(ref, progress=progress)
    parsed = parse_hub_ref(ref)
    snapshot = cached_snapshot(parsed)
    assert snapshot is not None  # fetch_hub gave a path in it
    return path, str(HubRef(parsed.repo, parsed.file, snapshot.name))


def _is_all(ref: HubRef, pulled: Path) -> bool:
    """Tell whether a pulled GGUF is all that a reference names: a bundle may have it, or others.

    Only the Hub knows: where it does not answer, the file is taken.
    """
    if ref.file or pulled.is_dir():
        return True
    snapshot = cached_snapshot(ref)
    assert snapshot is not None  # pulled_path gave a path in it
    try:
        files = list_files(HubRef(ref.repo, None, snapshot.name))
    except DownloadError:
        return True
    return [snapshot / file.name for file in _choose(ref, files)] == [pulled]


def _check_free(ref: str, parsed: HubRef, folder: Path) -> None:
    """A single named file may join others; a bundle or an adapter needs a folder of its own.

    What may be the same, fetched before or by another pull just now, is compared later.
    """
    if not os.path.lexists(folder):
        return
    if not folder.is_dir() or not (parsed.file or _is_empty(ref, folder) or _is_like(folder)):
        raise OutputFileError(
            f"Cannot pull {ref} to {folder}: it exists already and is not an empty folder. "
            "Name another folder with --to, or remove that one."
        )


def _is_like(folder: Path) -> bool:
    names = [BUNDLE_FILE, CONFIG_FILE, *(path.name for path in folder.glob("*.gguf"))]
    return any(os.path.isfile(folder / name) for name in names)


def _is_empty(ref: str, folder: Path) -> bool:
    try:
        return all(_PARTIAL.fullmatch(path.name) for path in folder.iterdir())
    except OSError as error:
        raise OutputFileError(
            f"Cannot pull {ref} to {folder}: listing this folder failed ({error.strerror}); "
            "expected one that is empty or new. Name another folder with --to."
        ) from error


def _fetch_into(ref: HubRef, listing: HubListing, folder: Path, progress: TellCount | None) -> Path:
    """Fetch into a hidden folder beside, and give the folder its name when all is there.

    A folder that exists has the hidden one inside, and gets what is in it: it may be a link, a
    disk of its own, or where somebody works. The hidden one stays when fetching fails, so that the
    next attempt goes on with its files.
    """
    folder = folder.absolute()
    if same := _same(ref, listing, folder):
        return same
    name = cut_name(folder.name, 100)
    try:
        with cache_lock(f"pull {folder}"):
            if same := _same(ref, listing, folder):  # another pull has fetched it meanwhile
                return same
            place = folder if folder.is_dir() else folder.parent
            partial = place / f".{name}.{listing.commit[:12]}.partial"
            partial.mkdir(parents=True, exist_ok=True)
            path = _fetch(ref, listing, partial, progress)
            shutil.rmtree(partial / ".cache", ignore_errors=True)  # of the Hub's library
            target = _same(ref, listing, folder) or _publish(path, folder)
            for left_over in place.glob(".*.partial"):
                if (match := _PARTIAL.fullmatch(left_over.name)) and match[1] == name:
                    shutil.rmtree(left_over, ignore_errors=True)
            return target
    except OSError as error:
        raise OutputFileError(
            f"Cannot pull {ref} to {folder}: writing there failed ({error.strerror or error}). "
            "Check that there is space and that you may write, or name another folder with --to."
        ) from error


def _already_there(ref: HubRef, listing: HubListing, folder: Path) -> Path | None:
    """The named file in the user's folder, when it is there. Raises when another one is."""
    (file,) = _choose(ref, listing)
    target = folder / PurePosixPath(file.name).name
    if not target.exists():
        return None
    problem = _problem(target, file) if target.is_file() else "is a folder"
    if problem is not None:
        raise OutputFileError(
            f"Cannot pull {ref} to {folder}: there is another {target.name}, which {problem}. "
            "Name another folder with --to, or remove it."
        )
    return target


def _same(ref: HubRef, listing: HubListing, folder: Path) -> Path | None:
    """What is to be fetched, where it is there. Raises when the folder holds something else."""
    if ref.file:
        return _already_there(ref, listing, folder)
    if not os.path.isdir(folder) or _is_empty(str(ref), folder):
        return None
    wanted = _choose(ref, listing)
    is_only = len(wanted) == 1 and wanted[0].name.endswith(".gguf")
    if is_only:
        wanted = [replace(wanted[0], name=PurePosixPath(wanted[0].name).name)]
    problem = _first_problem(folder, wanted)
    if problem is None and any(file.name == BUNDLE_FILE for file in wanted):
        text = parse_bundle((folder / BUNDLE_FILE).read_bytes(), str(folder / BUNDLE_FILE))
        problem = _first_problem(folder, _choose_packed(ref, listing, text))
    if problem is not None:
        raise OutputFileError(
            f"Cannot pull {ref} to {folder}: it is not an empty folder, and not what the Hub has "
            f"at {listing.commit}: {problem}. Name another folder with --to, or remove that one."
        )
    return folder / wanted[0].name if is_only else folder


def _first_problem(folder: Path, wanted: list[HubFile]) -> str | None:
    for file in wanted:
        if problem := _problem(safe_join(folder, file.name), file):
            return f"{file.name} {problem}"
    return None


def _publish(path: Path, folder: Path) -> Path:
    if path.is_dir():
        if not folder.is_dir():
            os.replace(path, folder)
            return folder
        # Last comes what makes it a bundle or an adapter.
        for entry in sorted(path.iterdir(), key=lambda e: e.name in (BUNDLE_FILE, CONFIG_FILE)):
            os.replace(entry, folder / entry.name)
        return folder
    folder.mkdir(exist_ok=True)
    os.replace(path, folder / path.name)
    return folder / path.name


def _fetch(
    ref: HubRef, listing: HubListing, local_dir: Path | None, progress: TellCount | None
) -> Path:
    """Fetch what a reference names; give its folder, or its file when it is one GGUF."""
    wanted = _choose(ref, listing)
    if wanted[0].name == BUNDLE_FILE:
        wanted = _choose_packed(ref, listing, _read_bundle(ref, listing, local_dir))
    total_bytes = sum(file.size_bytes for file in wanted)
    if len(wanted) > MAX_FILES or total_bytes > MAX_BYTES:
        raise DownloadError(
            f"it has {len(wanted)} files of {total_bytes} bytes together, over the limits of "
            f"{MAX_FILES} files and {MAX_BYTES} bytes. Fetch it with another tool."
        )
    here = local_dir or cached_snapshot(HubRef(ref.repo, None, listing.commit))
    here_bytes = sum(file.size_bytes for file in wanted if here and (here / file.name).is_file())
    place = local_dir.parent if local_dir else hub_cache_dir()
    existing = next(path for path in (place, *place.parents) if os.path.exists(path))
    check_space(existing, total_bytes - here_bytes, Path(ref.repo))

    def report(done_bytes: int) -> None:
        if progress is not None:
            progress(min(here_bytes + done_bytes, total_bytes), total_bytes)

    folder = _download(ref, listing, wanted, local_dir, report)
    report(total_bytes)
    is_file = len(wanted) == 1 and wanted[0].name.endswith(".gguf")
    return folder / wanted[0].name if is_file else folder


def _choose(ref: HubRef, listing: HubListing) -> list[HubFile]:
    """Choose one GGUF file, bundle.json, or the files of a PEFT adapter."""
    if ref.file:
        wanted = [file for file in listing.files if file.name == ref.file]
    elif bundle := listing.file(BUNDLE_FILE):
        return [bundle]
    elif listing.file(CONFIG_FILE):
        return _choose_peft(ref, listing)
    else:
        wanted = [file for file in listing.files if file.name.endswith(".gguf")]
    if len(wanted) == 1:
        return wanted
    expected = ref.file or f"{BUNDLE_FILE}, {CONFIG_FILE} or exactly one .gguf file"
    ggufs = [file.name for file in listing.files if file.name.endswith(".gguf")]
    raise DownloadError(
        f"expected {expected} in {ref.repo}; it has {len(listing.files)} files, and its .gguf "
        f"files are: {', '.join(ggufs[:10]) or 'none'}. {advice(ref, listing)}"
    )


def _choose_peft(ref: HubRef, listing: HubListing) -> list[HubFile]:
    weights = [
        file
        for file in listing.files
        if file.name.endswith(".safetensors")
        and file.name.startswith("adapter")
        and "/" not in file.name
    ]
    if not weights:
        names = [file.name for file in listing.files if file.name.startswith("adapter")]
        pickles = [name for name in names if name.endswith(PICKLES) and "/" not in name]
        pickled = f" but {pickles[0]}, a pickle" if pickles else ""
        raise DownloadError(
            f"expected {WEIGHTS_FILE} beside {CONFIG_FILE} in {ref.repo}; there is "
            f"none{pickled}. Ask its owner to save the adapter as safetensors."
        )
    named = [listing.file(name) for name in (CONFIG_FILE, INDEX_FILE, *DOCUMENTS)]
    return weights + [file for file in named if file is not None]


def _read_bundle(ref: HubRef, listing: HubListing, local_dir: Path | None) -> BundleText:
    file = listing.file(BUNDLE_FILE)
    assert file is not None
    if file.size_bytes > MAX_BUNDLE_BYTES:
        raise DownloadError(
            f"its {BUNDLE_FILE} has {file.size_bytes} bytes, expected at most {MAX_BUNDLE_BYTES}. "
            "Name another repository."
        )
    folder = _download(ref, listing, [file], local_dir, lambda done_bytes: None)
    return parse_bundle((folder / BUNDLE_FILE).read_bytes(), f"{BUNDLE_FILE} of {ref.repo}")


def _choose_packed(ref: HubRef, listing: HubListing, text: BundleText) -> list[HubFile]:
    """The files that bundle.json names, which must be the recorded ones, and the documents."""
    recorded = {adapter.file: adapter.sha256 for adapter in text.adapters}
    if text.base.file:
        recorded.setdefault(text.base.file, text.base.sha256)
    wanted = []
    for name in packed_files(text):
        file = listing.file(name)
        if file is None:
            raise DownloadError(
                f"its {BUNDLE_FILE} names {name}, which {ref.repo} does not have. "
                "Ask its owner to push the bundle again."
            )
        if file.sha256 not in (None, recorded[name]):
            raise DownloadError(
                f"its {name} has the SHA-256 {file.sha256}, expected {recorded[name]} as its "
                f"{BUNDLE_FILE} says. Ask its owner to push the bundle again."
            )
        wanted.append(file)
    named = [listing.file(name) for name in (BUNDLE_FILE, *DOCUMENTS)]
    return wanted + [file for file in named if file is not None]


def _download(
    ref: HubRef,
    listing: HubListing,
    files: Sequence[HubFile],
    local_dir: Path | None,
    report: TellBytes,
) -> Path:
    """Fetch files that are not here, and compare all with what the Hub lists; give their folder."""
    from huggingface_hub import snapshot_download

    for file in files:
        safe_join(local_dir or hub_cache_dir(), file.name)  # a repository's file names are not ours
    # By its name a branch is noted in the cache; a folder of the user's has no place for that.
    revision = listing.commit if local_dir else ref.revision
    with hub_errors(f"the Hub did not give the files of {ref.repo}"):
        folder = Path(
            snapshot_download(
                ref.repo,
                revision=revision,
                local_dir=local_dir,
                allow_patterns=[glob.escape(file.name) for file in files],
                tqdm_class=hub_progress(report),
            )
        )
    if local_dir is None and folder.name != listing.commit:
        raise DownloadError(
            f"{ref.revision or 'main'} of {ref.repo} moved while it was fetched, expected it at "
            f"{listing.commit}. Pull again."
        )
    for file in files:
        if problem := _problem(folder / file.name, file):
            _discard(folder / file.name)
            raise DownloadError(
                f"{file.name}, as it came, {problem}. It was thrown away; try again."
            )
    return folder


def _problem(path: Path, file: HubFile) -> str | None:
    if not path.is_file():
        return "is missing"
    size_bytes = path.stat().st_size
    if size_bytes != file.size_bytes:
        return f"has {size_bytes} bytes, the Hub lists {file.size_bytes}"
    if file.sha256 is not None:
        found = sha256_file(path)
        return None if found == file.sha256 else _other_hash("sha256", found, file.sha256)
    if file.git_sha1 is not None:
        found = _git_sha1(path, size_bytes)
        return None if found == file.git_sha1 else _other_hash("git sha1", found, file.git_sha1)
    return None


def _other_hash(kind: str, found: str, expected: str) -> str:
    return f"has {kind} {found}, the Hub lists {expected}"


def _git_sha1(path: Path, size_bytes: int) -> str:
    digest = sha1(b"blob %d\0" % size_bytes, usedforsecurity=False)
    for chunk in read_chunks(path):
        digest.update(chunk)
    return digest.hexdigest()


def _discard(path: Path) -> None:
    """Remove a wrong file, in the cache the blob that its name links to as well."""
    target = path.resolve()
    path.unlink(missing_ok=True)
    target.unlink(missing_ok=True)
