"""Names for things that were pulled: registry models and Hub references, looked up offline."""

from __future__ import annotations

from pathlib import Path

from qaflora_edge import hub, registry


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
        path = hub.pulled_path(hub_ref)
    return path
