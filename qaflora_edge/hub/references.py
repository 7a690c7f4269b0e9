"""Names for things that were pulled: registry models and Hub references, looked up offline."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from qaflora_edge.errors import BundleError
from qaflora_edge.formats.bundle_format import BUNDLE_FILE, BaseRecord
from qaflora_edge.formats.checksums import check_file
from qaflora_edge.hub import cache as hub_cache
from qaflora_edge.hub import pull as hub
from qaflora_edge.hub import registry


def pulled_model(name: str) -> Path | None:
    """The file of a registry model when it is here, else None; None too for an unknown name."""
    model = registry.load_registry().get(name)
    return None if model is None else registry.local_path(model)


def model_name(sha256: str) -> str | None:
    """The registry's name for a file, or None."""
    models = registry.load_registry().values()
    return next((model.name for model in models if model.sha256 == sha256), None)


def pulled_base(registry_name: str | None, hub_ref: str | None) -> Path | None:
    """Where `qaflora pull` has put a base, else None."""
    path = pulled_model(registry_name) if registry_name else None
    if path is None and hub_ref:
        path = hub_cache.pulled_path(hub_ref)
    return path


def fetch_base(
    folder: Path, base: BaseRecord, progress: Callable[[int, int], None] | None = None
) -> Path:
    """Fetch the base of the bundle in a folder from where bundle.json says.

    Raises BundleError when it says only a file, ChecksumError when what came is another file,
    DownloadError when it does not come.
    """
    where = folder / BUNDLE_FILE
    if base.registry in registry.load_registry():
        path = registry.fetch_model(str(base.registry), progress=progress)
    elif base.hub:
        path = hub.fetch_hub(base.hub, progress=progress)
    else:
        raise BundleError(
            f"Cannot fetch the base of {where}: it says neither base.registry nor base.hub; "
            f"expected one of them. Find the file with the SHA-256 {base.sha256} and name it with "
            "`qaflora bundle base`."
        )
    check_file(
        path,
        what="The base",
        sha256=base.sha256,
        size_bytes=base.size_bytes,
        recorded_in=str(where),
        advice="Ask the owner of the bundle for its base.",
    )
    return path
