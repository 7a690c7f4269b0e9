"""Bundles by name: those in the places of the setting `bundles`, and those that were pulled."""

import itertools
import json
from pathlib import Path
from typing import Any

from qaflora_edge.settings import bundle_places

BUNDLE_FILE = "bundle.json"
MAX_NAMES_BYTES = 16 << 20
MAX_ENTRIES = 1000


def is_bundle(folder: Path) -> bool:
    """Tell whether a folder looks like a bundle; nothing is read."""
    try:
        return (folder / BUNDLE_FILE).is_file()
    except (OSError, ValueError):
        return False


def bundles_in(folder: Path) -> list[Path]:
    """The bundles directly inside a folder, by name; none when it cannot be read."""
    try:
        entries = sorted(itertools.islice(folder.iterdir(), MAX_ENTRIES))
    except (OSError, ValueError):
        return []
    return [entry for entry in entries if is_bundle(entry)]


def named_bundles() -> dict[str, Path]:
    """Name -> folder of every bundle in the places of the setting `bundles`; the first one wins.

    Raises SettingsError when the settings file cannot be read.
    """
    found: dict[str, Path] = {}
    for place in bundle_places():
        for folder in [place] if is_bundle(place) else bundles_in(place):
            found.setdefault(folder.name, folder)
    return found


def pulled_bundles() -> dict[str, Path]:
    """owner/name -> folder of every bundle that `qaflora pull` has fetched whole."""
    from qaflora_edge.hub.cache import pulled

    return {name: path for _, name, path in pulled() if is_bundle(path)}


def adapter_names(folder: Path) -> list[str]:
    """The adapters that a bundle names, unchecked; none when bundle.json cannot be read.

    For suggestions only: loading the bundle is what checks it.
    """
    try:
        names = [adapter["name"] for adapter in _unchecked(folder)["adapters"]]
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return []
    return [name for name in names if isinstance(name, str)]


def _unchecked(folder: Path) -> Any:
    with (folder / BUNDLE_FILE).open("rb") as file:
        return json.loads(file.read(MAX_NAMES_BYTES))
