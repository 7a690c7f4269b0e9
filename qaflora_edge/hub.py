"""Bundles, bases and adapters by name: what is here, what is fetched, and what was pulled.

Models of the registry lie in our cache. What comes from the Hub lies in the cache of the Hub's own
library, which other tools share. It brings the token (HF_TOKEN, or what `hf auth login` stored),
the endpoint, retries and progress bars. It is imported when it is needed, which takes a moment.
"""

import contextlib
import glob
import hashlib
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from qaflora_edge.config import bundle_places
from qaflora_edge.errors import (
    BundleError,
    DownloadError,
    InputFileError,
    OutputFileError,
    QafloraError,
    RegistryError,
    os_errors,
)
from qaflora_edge.files import CHUNK_BYTES, AnyPath, atomic_path, cache_dir, cache_lock, make_folder
from qaflora_edge.formats.bundle import (
    BUNDLE_FILE,
    TAUGHT_FILE,
    packed_files,
    read_bundle_text,
    safe_join,
)
from qaflora_edge.formats.names import (
    CONFIG_FILE,
    PICKLES,
    WEIGHTS_FILE,
    HubRef,
    Model,
    find_model,
    load_registry,
    local_path,
    models_dir,
    parse_hub_ref,
)
from qaflora_edge.progress import TellCount, silent

LIST_TIMEOUT_SECONDS = 30
_NAMES = ("ETag", "X-Linked-Etag", "X-Repo-Commit")  # headers that become names of files
_SAFE_NAME = re.compile(r'(W/)?"?[\w.-]*"?')
# Fetched next to the files of a bundle or an adapter.
DOCUMENTS = ("README.md", "LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE", TAUGHT_FILE)
ADVICE = (
    "Check the name and the network, and that your token may do it (`hf auth whoami`, HF_TOKEN); "
    "try again."
)


def is_bundle(folder: Path) -> bool:
    """Tell whether a folder looks like a bundle; nothing is read."""
    return os.path.isfile(folder / BUNDLE_FILE)


def bundles_in(folder: Path) -> list[Path]:
    """List the bundles directly inside a folder; none when it cannot be read."""
    with contextlib.suppress(OSError, ValueError):
        return [path.parent for path in sorted(folder.glob(f"*/{BUNDLE_FILE}"))]
    return []


def named_bundles() -> dict[str, Path]:
    """Map names to the bundles in the places of the setting `bundles`; the first one wins."""
    by_name: dict[str, Path] = {}
    for listed in bundle_places():
        for folder in [listed] if is_bundle(listed) else bundles_in(listed):
            by_name.setdefault(folder.name, folder)
    return by_name


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
    files = list(folder.rglob("*.gguf"))
    return files[0] if len(files) == 1 else None


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
            folder = kept.snapshot_path
            whole = whole_path(folder, None)
            for path in [whole] if whole else sorted(folder.rglob("*.gguf")):
                file = None if whole else path.relative_to(folder).as_posix()
                ref = HubRef(repo.repo_id, file, None if revision == "main" else revision)
                with contextlib.suppress(RegistryError):  # a repository without an owner
                    parse_hub_ref(str(ref))
                    yield str(ref), path, kept.commit_hash


def fetch_model(name: str, *, progress: TellCount = silent) -> Path:
    """Give the path of a model's file in the cache, fetching it if it is not there.

    Raises RegistryError for an unknown name, DownloadError with what the Hub said.
    """
    model = find_model(name)
    if path := local_path(model):
        return path
    make_folder(models_dir(), "the environment variable QAFLORA_CACHE")
    with cache_lock(model.sha256):  # a second process then finds the file
        return local_path(model) or _fetch_model(model, progress)


def _fetch_model(model: Model, progress: TellCount) -> Path:
    parts = cache_dir() / "parts" / model.sha256[:16]
    parts.mkdir(parents=True, exist_ok=True)
    try:
        path = fetch_hub(str(model.hub), parts, progress=progress)
        return write_model(model, _chunks(path))
    except DownloadError as error:
        raise DownloadError(
            f"Could not fetch the model {model.name!r} ({model.size_bytes} bytes, sha256 "
            f"{model.sha256}): {error}\nWhere the Hub cannot be reached: `python models/pull.py "
            f"{model.name}` in a checkout of qaflora-edge, or put the file at "
            f"{models_dir() / model.file} yourself."
        ) from error


def write_model(model: Model, chunks: Iterable[bytes]) -> Path:
    """Write a model's file, which gets its name only when its hash is right; then its parts go."""
    target = models_dir() / model.file
    parts = cache_dir() / "parts" / model.sha256[:16]
    digest = hashlib.sha256()
    with atomic_path(target) as temporary:
        with temporary.open("wb") as file:
            for chunk in chunks:
                digest.update(chunk)
                file.write(chunk)
        shutil.rmtree(parts, ignore_errors=True)
        if digest.hexdigest() != model.sha256:
            raise DownloadError(
                f"what came is not {model.file}: its sha256 is {digest.hexdigest()}, expected "
                f"{model.sha256}. It was thrown away."
            )
    return target


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        yield from iter(partial(file.read, CHUNK_BYTES), b"")


def fetch_hub(
    ref: str,
    to: AnyPath | None = None,
    *,
    update: bool = False,
    progress: TellCount | None = None,
) -> Path:
    """Fetch a bundle or a PEFT adapter (gives its folder), or a single GGUF (gives its file).

    to      a folder, by default the Hub's cache
    update  ask for the newest commit of the branch, even when one is in the cache

    Raises DownloadError when the Hub does not give it, BundleError for a broken bundle.json.
    """
    parsed = parse_hub_ref(ref)
    here = None if to is not None or update else pulled_path(ref)
    if here is not None and (parsed.file or here.is_dir()):
        return here  # only the Hub knows whether one GGUF file is all of a repository
    from huggingface_hub import HfApi

    target = None if to is None else Path(to).absolute()  # the library expands ~
    try:
        with hub_errors(f"the Hub did not give the list of files of {parsed.repo}"):
            info = HfApi().model_info(
                parsed.repo, revision=parsed.revision, timeout=LIST_TIMEOUT_SECONDS
            )
        listed = [str(sibling.rfilename) for sibling in info.siblings or []]
        names = _choose(parsed, listed)
        folder = _download(parsed, names, target, progress)
        if names == [BUNDLE_FILE]:
            packed = packed_files(read_bundle_text(folder))
            documents = [name for name in DOCUMENTS if name in listed]
            folder = _download(parsed, [BUNDLE_FILE, *packed, *documents], target, progress)
    except DownloadError as error:
        raise DownloadError(f"Could not pull {ref}: {error}") from error
    path = whole_path(folder, names[0] if names[0].endswith(".gguf") else None)
    if path is None:
        raise DownloadError(
            f"Could not pull {ref}: {parsed.repo} lacks files that its {names[0]} names; expected "
            "all of them. Ask its owner to push it again."
        )
    return path


def _choose(ref: HubRef, names: Sequence[str]) -> list[str]:
    if not ref.file and BUNDLE_FILE in names:
        return [BUNDLE_FILE]
    if not ref.file and CONFIG_FILE in names:
        return _choose_peft(ref, names)
    ggufs = [name for name in names if name.endswith(".gguf")]
    wanted = [name for name in ggufs if ref.file in (None, name)]
    if len(wanted) == 1:
        return wanted
    expected = ref.file or f"{BUNDLE_FILE}, {CONFIG_FILE} or exactly one .gguf file"
    raise DownloadError(
        f"expected {expected} in {ref.repo}; it has {len(names)} files, and its .gguf "
        f"files are: {', '.join(ggufs[:10]) or 'none'}. Name one as owner/name/file.gguf. An "
        f"adapter in a sub-folder is fetched with `hf download {ref.repo} --local-dir DIR`; a "
        "whole model has to become a GGUF first, with llama.cpp's convert_hf_to_gguf.py."
    )


def _choose_peft(ref: HubRef, names: Sequence[str]) -> list[str]:
    adapter = [name for name in names if name.startswith("adapter") and "/" not in name]
    weights = [name for name in adapter if name.endswith(".safetensors")]
    if not weights:
        pickles = [name for name in adapter if name.endswith(PICKLES)]
        pickled = f" but {pickles[0]}, a pickle" if pickles else ""
        raise DownloadError(
            f"expected {WEIGHTS_FILE} next to {CONFIG_FILE} in {ref.repo}; there is "
            f"none{pickled}. Ask its owner to save the adapter as safetensors."
        )
    return [CONFIG_FILE, *weights, *(name for name in DOCUMENTS if name in names)]


def _download(
    ref: HubRef, names: Sequence[str], to: Path | None, progress: TellCount | None
) -> Path:
    from huggingface_hub import get_session, snapshot_download

    for name in names:
        safe_join(to or hub_cache_dir(), name)  # a repository's file names are not ours
    # huggingface_hub 2.4.0 joins an ETag to its cache's path as it is.
    hooks = get_session().event_hooks["response"]
    if _check_names not in hooks:
        hooks.append(_check_names)
    patterns = [glob.escape(name) for name in names]
    bar = None if progress is None else _telling(progress)
    with hub_errors(f"the Hub did not give the files of {ref.repo}"):
        folder = snapshot_download(
            ref.repo, revision=ref.revision, local_dir=to, allow_patterns=patterns, tqdm_class=bar
        )
    return Path(folder)


def _telling(progress: TellCount) -> type[Any]:
    from huggingface_hub.utils.tqdm import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            self.n_byte = 0
            self.is_of_bytes = options.get("unit") == "B"
            super().__init__(*args, **options)  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> bool | None:
            self.n_byte += int(n or 0)
            if self.is_of_bytes:
                progress(self.n_byte, int(self.total or 0))
            shown: bool | None = super().update(n)
            return shown

    return Bar


def _check_names(response: Any) -> None:
    """Refuse an answer about a file that would be kept outside of the cache."""
    if response.request.method != "HEAD":
        return
    for name in _NAMES:
        value = response.headers.get(name, "")
        if not _SAFE_NAME.fullmatch(value):
            raise DownloadError(
                f"the Hub answers with the {name} {value!r:.100}, expected letters, digits, '.', "
                "'_' and '-'. This is no Hub to trust; look at HF_ENDPOINT."
            )


@contextlib.contextmanager
def hub_errors(failure: str) -> Iterator[None]:
    """Turn whatever the Hub's library raises into an error of ours that says what to do.

    failure  what the Hub did not do, such as "the Hub did not give a.gguf"
    """
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()  # the library draws them anywhere
    try:
        yield
    except QafloraError:
        raise
    except Exception as error:  # of the library's network library too, whose classes changed
        reason = " ".join(str(error).split()).rstrip(". ")
        raise DownloadError(f"{failure}: {type(error).__name__}: {reason}. {ADVICE}") from error


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
        if base := local_path(model):
            rest.append(Here("base", model.name, base, is_pulled=True))
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
    """Find what was pulled under a name, and after it the other files of its commit."""
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
