"""Fetch a model of the registry into the cache, or a folder: whole, and with the right hash."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from qaflora_edge.errors import DownloadError, OutputFileError
from qaflora_edge.files import (
    AnyPath,
    atomic_path,
    cache_dir,
    cache_lock,
    make_folder,
    sha256_file,
)
from qaflora_edge.formats.registry import Model, find_model, local_path, models_dir
from qaflora_edge.hub.download import check_space, fetch_source, folder_bytes, read_chunks
from qaflora_edge.progress import TellCount


def fetch_model(name: str, *, to: AnyPath | None = None, progress: TellCount | None = None) -> Path:
    """Give the path of a model's file, fetching it if it is not here.

    `to` is the folder that gets the file, the cache by default. Raises RegistryError for an
    unknown name, OutputFileError where that folder has another file of this name, and
    DownloadError with what every source said when none of them gave the file.
    """
    model = find_model(name)
    folder = models_dir() if to is None else Path(to)
    if path := _already_there(model, to):
        return path
    make_folder(folder, "--to, or with the environment variable QAFLORA_CACHE")
    # Two processes must not fetch the same parts; the second then finds the file.
    with cache_lock(model.sha256):
        return _already_there(model, to) or _fetch_locked(model, folder, progress)


def _already_there(model: Model, to: AnyPath | None) -> Path | None:
    """The model's file where it is wanted; in a folder of the user's it is compared."""
    if to is None:
        return local_path(model)
    target = Path(to) / model.file
    if not os.path.lexists(target):
        return None
    if local_path(model, Path(to)) is None or sha256_file(target) != model.sha256:
        raise OutputFileError(
            f"Cannot pull {model.name} to {to}: there is another {model.file}, which is not the "
            f"one of {model.size_bytes} bytes with the SHA-256 {model.sha256}. Name another folder "
            "with --to, or remove it."
        )
    return target


def _fetch_locked(model: Model, folder: Path, progress: TellCount | None) -> Path:
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
            _check_space(model, parts_folder, target)
            with fetch_source(source, parts_folder, report) as chunks:
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


def _check_space(model: Model, parts_folder: Path, target: Path) -> None:
    """Raise DownloadError where the parts that are missing and the file do not both fit."""
    parts_bytes = max(0, model.size_bytes - folder_bytes(parts_folder))
    is_one_disk = cache_dir().stat().st_dev == target.parent.stat().st_dev
    check_space(target.parent, model.size_bytes + parts_bytes * is_one_disk, target)
    check_space(cache_dir(), parts_bytes, parts_folder)


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
