"""Bundles and bases that are here, by name and with their sizes; removing what was pulled."""

import datetime
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qaflora_edge.errors import BundleError, InputFileError, OutputFileError, QafloraError
from qaflora_edge.formats.registry import load_registry, local_path
from qaflora_edge.hub.bundle_names import bundles_in, is_bundle, named_bundles
from qaflora_edge.hub.cache import pulled


@dataclass(frozen=True)
class Here:
    """A bundle, a base or an adapter that is here.

    name     what a command takes for it
    folder   of what was pulled and can be removed: the file in our cache, or its repository's
             folder in the Hub's; None for what is the user's own
    """

    kind: str
    name: str
    path: Path
    folder: Path | None = None

    @property
    def size_bytes(self) -> int:
        """Bytes of its files, each counted once; a bundle's base is another entry."""
        sizes = {(s.st_dev, s.st_ino): s.st_size for s in self._states()}
        return sum(sizes.values())

    @property
    def used(self) -> datetime.date:
        """The day on which one of its files was last read, as far as the file system notes it."""
        times = [max(state.st_atime, state.st_mtime) for state in self._states()]
        return datetime.date.fromtimestamp(max(times, default=0.0))

    def _states(self) -> Iterator[os.stat_result]:
        files = [self.path] if self.path.is_file() else _files(self.path)
        for path in files:
            try:
                yield path.stat()
            except OSError:  # removed meanwhile, or a broken link
                continue

    def to_dict(self) -> dict[str, Any]:
        """As `qaflora list --json` prints it."""
        return {
            "kind": self.kind,
            "name": self.name,
            "path": str(self.path),
            "size_bytes": self.size_bytes,
            "last_used": self.used.isoformat(),
            "is_pulled": self.folder is not None,
        }


def _files(folder: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(folder):
        for name in names:
            yield Path(parent, name)


def all_here() -> list[Here]:
    """Bundles of the working folder, of the setting `bundles` and of the Hub; then bases."""
    own = {str(path): Path(path) for path in bundles_in(Path())}
    bundles = own | named_bundles() | own  # in the order of the first, and they win
    found = [Here("bundle", name, path.absolute()) for name, path in bundles.items()]
    others = [Here(_kind(path), name, path, folder) for folder, name, path in pulled()]
    found += [here for here in others if here.kind == "bundle"]
    for model in load_registry().values():
        if path := local_path(model):
            found.append(Here("base", model.name, path, path))
    return found + [here for here in others if here.kind != "bundle"]


def _kind(path: Path) -> str:
    if path.is_dir():
        return "bundle" if is_bundle(path) else "adapter"
    from qaflora_edge.formats.gguf import read_gguf_header

    try:
        is_adapter = read_gguf_header(path).metadata.get("general.type") == "adapter"
    except QafloraError:
        return "file"
    return "adapter" if is_adapter else "base"


def find_pulled(name: str) -> Here:
    """What was pulled under a name. Raises InputFileError when that is nothing."""
    for here in all_here():
        if here.name == name and here.folder is not None:
            return here
    if os.path.exists(name):
        raise InputFileError(
            f"Cannot remove {name}: it was not pulled but is a file or folder of your own; "
            "expected what `qaflora list` shows as pulled. Delete it yourself."
        )
    raise InputFileError(
        f"Cannot remove {name}: nothing was pulled under this name; expected one that `qaflora "
        "list` shows as pulled. Look there."
    )


def users_of(base: Here) -> list[str]:
    """Names of the bundles here that need a base."""
    from qaflora_edge.bundles.open import read_bundle_text, recorded_base

    names = []
    for here in all_here():
        if here.kind == "bundle":
            try:
                path = recorded_base(here.path, read_bundle_text(here.path).base)
            except BundleError:
                continue
            if path is not None and os.path.samefile(path, base.path):
                names.append(here.name)
    return names


def remove_pulled(here: Here) -> None:
    """Remove what was pulled. Raises OutputFileError when the system does not let it go."""
    assert here.folder is not None
    try:
        if here.folder.is_dir():
            _remove_cached(here.folder, here.path)
        else:
            here.folder.unlink()
    except OSError as error:
        raise OutputFileError(
            f"Cannot remove {here.path}: {error.strerror or error}. Check that you may change it "
            "and that no other program uses it; try again."
        ) from error


def _remove_cached(repo_dir: Path, path: Path) -> None:
    """Remove a commit or a file of one from the Hub's cache, and the blobs that no other needs."""
    blobs = {path.resolve() for path in (_files(path) if path.is_dir() else [path])}
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    left = {path.resolve() for path in _files(repo_dir / "snapshots")}
    if not left:
        shutil.rmtree(repo_dir)
    for blob in blobs - left:
        if blob.is_relative_to(repo_dir.resolve()):  # others are shared by repositories
            blob.unlink(missing_ok=True)
