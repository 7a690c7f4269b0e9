"""What DIR names: a bundle, or a base; and what to type where it is something else."""

import os
from collections.abc import Iterable
from pathlib import Path

import click

from qaflora_edge.config import expanded
from qaflora_edge.errors import BundleError, QafloraError, RegistryError, nearest
from qaflora_edge.files import one_line
from qaflora_edge.formats import names as registry


def bundle_folder(text: str) -> Path:
    """What DIR names: a bundle's folder, a base's GGUF file, or one of both that has a name.

    Names are those of bundles in the setting `bundles`, of the registry, and the Hub's references.
    """
    folder = Path(text)
    if os.path.exists(folder):
        refuse_adapter(folder)
        return folder
    from qaflora_edge.hub import bundles_in, named_bundles, pulled_path

    if named := named_bundles().get(text):
        return named
    text = registry.from_address(text)
    model = registry.load_registry().get(text)
    try:
        if path := registry.pulled_model(text) if model else pulled_path(text):
            return path
    except RegistryError:
        if folder.name != text:
            return folder  # a path: reported as the missing folder that it is
        here = [path.name for path in bundles_in(Path())]
        names = [*here, *named_bundles(), *registry.load_registry()]
        near = nearest(text, names)
        advice = "See `qaflora --help`."
        if near:
            advice = f"Did you mean {near}?"
        raise BundleError(
            f"Cannot open {text}: there is no such folder, file or name; expected the folder "
            f"of a bundle, the .gguf of a base, or a name of `qaflora list` or `qaflora models`. "
            f"{advice}"
        ) from None
    kind = "base"
    if model is None:
        kind = "bundle"
    raise BundleError(
        f"Cannot open the {kind} {text}: there is no such "
        f"folder, and it was not pulled. Fetch it with `qaflora pull {text}`, or give the "
        "folder of a bundle."
    )


def missing_base(adapters: Iterable[str]) -> click.UsageError:
    """Ask for --base, by the name that the config of an adapter has for it."""
    trained_on = next(filter(None, map(_trained_on, adapters)), None)
    name = trained_on
    if name is None:
        name = "the base that the adapter was trained on"
    return click.UsageError(
        f"Missing option '--base': give a GGUF of {name}, in any quantisation: a file, a name of "
        "`qaflora models` that was pulled, or owner/name/file.gguf on the Hub."
    )


def refuse_adapter(folder: Path) -> None:
    """Raise BundleError for a PEFT or MLX folder in place of a bundle: say its base, what to type.

    A bundle, or what is no such folder, passes.
    """
    from qaflora_edge.formats.bundle import BUNDLE_FILE

    is_other = not folder.is_dir() or os.path.exists(folder / BUNDLE_FILE)
    if is_other or (trained_on := _trained_on(str(folder))) is None:
        return
    name = registry.plain_name(trained_on)
    models = registry.load_registry().values()
    model = next((model for model in models if registry.plain_name(model.name) == name), None)
    base = "BASE.gguf"
    if model is not None:
        base = model.name
    raise BundleError(
        f"Cannot open {folder}: it is an adapter for {trained_on}, expected a bundle or a base. "
        f"Give its base, in any quantisation: qaflora run {base} --adapter {folder} PROMPT"
    )


def _trained_on(adapter: str) -> str | None:
    """What the config of a PEFT or MLX folder says; None for anything else."""
    from qaflora_edge.peft.config import is_mlx
    from qaflora_edge.peft.folder import read_fields

    try:
        _, fields = read_fields(expanded(adapter))
    except QafloraError:  # what reads the adapter will say what is wrong
        return None
    key = "base_model_name_or_path"
    if is_mlx(fields):
        key = "model"
    name = fields.get(key)
    if not isinstance(name, str) or not name.strip():
        return None
    return one_line(name[:200])
