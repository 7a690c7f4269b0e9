"""The user's settings file: where it is, and what the library itself takes from it.

The file is TOML. Most of its keys are options of commands, which `qaflora_edge.cli.settings`
checks; `cache` and `bundles` are for the library as well and are checked here.
"""

import os
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qaflora_edge.config import removed
from qaflora_edge.errors import SettingsError, nearest

APP = "qaflora-edge"
FILE = "config.toml"
MAX_SETTINGS_BYTES = 1 << 20
LIBRARY_KEYS = ("cache", "bundles")
Table = dict[str, Any]  # of TOML


def expanded(text: str) -> Path:
    """A path with `~` for the home of the user; that of an unknown user stays as it is."""
    return Path(os.path.expanduser(text))


def settings_path() -> Path:
    """Name the settings file; it may not exist."""
    if chosen := os.environ.get("QAFLORA_CONFIG"):
        return expanded(chosen).absolute()
    import platformdirs

    return platformdirs.user_config_path(APP, appauthor=False, roaming=True) / FILE


def read_settings() -> Table:
    """Read the settings file; no file means no settings, unless QAFLORA_CONFIG names it.

    Raises SettingsError when it cannot be read, is no TOML, or has a wrong `cache` or `bundles`.
    """
    path = settings_path()
    if str(path) == os.devnull or not (os.path.exists(path) or os.environ.get("QAFLORA_CONFIG")):
        return {}
    settings = _read_toml(path)
    if "cache" in settings and not _is_text(settings["cache"]):
        raise wrong_value(path, "cache", settings["cache"], "the path of a folder, as a text")
    places = settings.get("bundles", [])
    if not (isinstance(places, list) and all(_is_text(place) for place in places)):
        raise wrong_value(path, "bundles", places, "a list of paths of folders, as texts")
    return settings


def _read_toml(path: Path) -> Table:
    try:
        if not os.path.isfile(path):  # a pipe would be waited for
            raise ValueError("it is no plain file" if os.path.exists(path) else "it does not exist")
        with path.open("rb") as file:
            data = file.read(MAX_SETTINGS_BYTES + 1)
        if len(data) > MAX_SETTINGS_BYTES:
            raise ValueError(f"it has more than {MAX_SETTINGS_BYTES} bytes")
        return tomllib.loads(data.decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise SettingsError(
            f"Cannot read the settings in {path}: {reason}; expected TOML in UTF-8, with lines "
            'such as strategy = "calibrated". Correct or remove the file, or set QAFLORA_CONFIG '
            "to another one."
        ) from error


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip()) and "\0" not in value


def wrong_value(path: Path, key: str, found: object, expected: str) -> SettingsError:
    """The error for a key with a value that it cannot have."""
    return SettingsError(
        f"Cannot use the settings in {path}: the key {key} is {found!r}, expected {expected}. "
        "Correct it, or remove it for the default."
    )


def unknown_key(path: Path, key: str, known: Iterable[str]) -> SettingsError:
    """The error for a key that is no setting, with the nearest one that is."""
    if instead := removed(key.rpartition(".")[2]):
        return SettingsError(f"Cannot use the settings in {path}: {instead} Remove the key {key}.")
    names = sorted(known)
    near = nearest(key, names)
    meant = f"Did you mean {near}? Correct the key" if near else "Correct the key"
    return SettingsError(
        f"Cannot use the settings in {path}: there is no key {key!r} here, expected one of "
        f"{', '.join(names)}. {meant}, or remove it."
    )


def cache_setting() -> Path | None:
    """The folder for downloads that the user chose: by environment, else by file, else None."""
    if chosen := os.environ.get("QAFLORA_CACHE"):
        return expanded(chosen).absolute()
    text = read_settings().get("cache")
    return None if text is None else _from_file(text)


def bundle_places() -> list[Path]:
    """Folders that hold bundles, or are bundles, as the user named them; they may not exist."""
    if chosen := os.environ.get("QAFLORA_BUNDLES"):
        return [expanded(text).absolute() for text in chosen.split(os.pathsep) if text]
    return [_from_file(text) for text in read_settings().get("bundles", [])]


def _from_file(text: str) -> Path:
    return settings_path().parent / expanded(text)
