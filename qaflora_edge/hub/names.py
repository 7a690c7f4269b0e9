"""What is on this machine, by name: bundles, bases and adapters; removing what was pulled."""

import datetime
import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qaflora_edge.errors import InputFileError, OutputFileError, QafloraError, os_errors
from qaflora_edge.formats.names import load_registry, local_path
from qaflora_edge.settings import bundle_places

BUNDLE_FILE = "bundle.json"
MAX_NAMES_BYTES = 16 << 20
MAX_ENTRIES = 1000


def is_bundle(folder: Path) -> bool:
    """Tell whether a folder looks like a bundle; nothing is read."""
    return os.path.isfile(folder / BUNDLE_FILE)


def bundles_in(folder: Path) -> list[Path]:
    """List the bundles directly inside a folder; none when it cannot be read."""
    try:
        entries = sorted(itertools.islice(folder.iterdir(), MAX_ENTRIES))
    except (OSError, ValueError):
        return []
    return [entry for entry in entries if is_bundle(entry)]


def named_bundles() -> dict[str, Path]:
    """Map names to the bundles in the places of the setting `bundles`; the first one wins.

    Raises SettingsError when the settings file cannot be read.
    """
    found: dict[str, Path] = {}
    for place in bundle_places():
        for folder in [place] if is_bundle(place) else bundles_in(place):
            found.setdefault(folder.name, folder)
    return found


def pulled_bundles() -> dict[str, Path]:
    """Map owner/name to every complete bundle that `qaflora pull` has fetched."""
    from qaflora_edge.hub.local import pulled

    return {name: path for name, path, _ in pulled() if is_bundle(path)}


def adapter_names(folder: Path) -> list[str]:
    """List the adapters that a bundle names, unchecked, for suggestions; none when unreadable."""
    try:
        with (folder / BUNDLE_FILE).open("rb") as file:
            content = json.loads(file.read(MAX_NAMES_BYTES))
        names = [adapter["name"] for adapter in content["adapters"]]
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return []
    return [name for name in names if isinstance(name, str)]


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
        """Bytes of its files, each counted once; a bundle's base is another entry."""
        sizes = {(s.st_dev, s.st_ino): s.st_size for s in self._states()}
        return sum(sizes.values())

    def _states(self) -> Iterator[os.stat_result]:
        folders = os.walk(self.path)
        files = [Path(parent, name) for parent, _, names in folders for name in names]
        for path in files if self.path.is_dir() else [self.path]:
            try:
                yield path.stat()
            except OSError:  # a broken link, or a file that was just removed
                continue

    def to_dict(self) -> dict[str, Any]:
        """Give what `qaflora list --json` prints.

        last_used is the day on which one of its files was last read, as the file system notes it.
        """
        times = [max(state.st_atime, state.st_mtime) for state in self._states()]
        return {
            "kind": self.kind,
            "name": self.name,
            "path": str(self.path),
            "size_bytes": self.size_bytes,
            "last_used": datetime.date.fromtimestamp(max(times, default=0.0)).isoformat(),
            "is_pulled": self.is_pulled,
        }


def all_here() -> list[Here]:
    """List bundles of the working folder, the setting `bundles` and the Hub; then the rest."""
    from qaflora_edge.hub.local import pulled

    own = {str(path): Path(path) for path in bundles_in(Path())}
    bundles = own | named_bundles() | own  # in the order of the first, and they win
    found = [Here("bundle", name, path.absolute()) for name, path in bundles.items()]
    others = [Here(_kind(path), name, path, True, commit) for name, path, commit in pulled()]
    found += [here for here in others if here.kind == "bundle"]
    for model in load_registry().values():
        if place := local_path(model):
            found.append(Here("base", model.name, place, is_pulled=True))
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


def find_pulled(name: str) -> list[Here]:
    """Find what was pulled under a name, and after it the other files of its commit.

    Raises InputFileError when nothing was.
    """
    everything = all_here()
    for here in everything:
        if here.name == name and here.is_pulled:
            others = [each for each in everything if each.commit == here.commit != ""]
            return [here, *(each for each in others if each is not here)]
    if os.path.exists(name):
        raise InputFileError(
            f"Cannot remove {name}: it was not pulled but is a file or folder of your own; "
            "expected what `qaflora list` shows as pulled. Delete it yourself."
        )
    raise InputFileError(
        f"Cannot remove {name}: nothing was pulled under this name; expected one that `qaflora "
        "list` shows as pulled. Look there."
    )


def remove_pulled(here: Here) -> None:
    """Remove what was pulled, with its whole commit. Raises OutputFileError."""
    from qaflora_edge.hub.local import remove_commit

    advice = "Check that you may change it and that no other program uses it; try again."
    with os_errors(OutputFileError, f"Cannot remove {here.path}", advice):
        if here.commit:
            remove_commit(here.commit, here.path)
        else:
            here.path.unlink()
