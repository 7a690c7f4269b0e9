"""The base of an adapter, where the user gives none: the adapter says what it was trained on."""

import os
from collections.abc import Iterable
from pathlib import Path

import click

from qaflora_edge.errors import BundleError, QafloraError
from qaflora_edge.files import one_line
from qaflora_edge.formats.names import Model, load_registry, plain_name, pulled_model
from qaflora_edge.settings import expanded


def choose_base(base: str | None, adapters: Iterable[str]) -> str:
    """Take the base that was given, else the model that the first adapter was trained on.

    adapters  as they were given: those that are PEFT or MLX folders here are asked

    Raises UsageError when the base is not known or not here.
    """
    if base is not None:
        return base
    trained_on = next(filter(None, map(_trained_on, adapters)), None)
    if trained_on is None:
        raise click.UsageError(
            "Missing option '--base': give the GGUF of the base that the adapter was trained on."
        )
    said = f"The adapter says that it was trained on {trained_on}"
    if (model := _known(trained_on)) is None:
        raise click.UsageError(
            f"Missing option '--base'. {said}: give a GGUF of it, in any quantisation. On the Hub "
            "it is mostly in a repository whose name ends in GGUF; with --base "
            "owner/name/file.gguf it is fetched."
        )
    if pulled_model(model.name) is None:
        raise click.UsageError(
            f"Missing option '--base'. {said}, which is not here; `qaflora pull {model.name}` "
            f"fetches it ({model.size_bytes / 1e6:.0f} MB), and --base {model.name} names it."
        )
    click.echo(f"{said}: the base is {model.name}.", err=True)
    return model.name


def refuse_adapter(folder: Path) -> None:
    """Raise BundleError for a PEFT or MLX folder in place of a bundle: say its base, what to type.

    A bundle, or what is no such folder, passes.
    """
    from qaflora_edge.formats.bundle import BUNDLE_FILE

    is_other = not folder.is_dir() or os.path.exists(folder / BUNDLE_FILE)
    if is_other or (trained_on := _trained_on(str(folder))) is None:
        return
    model = _known(trained_on)
    base = "BASE.gguf" if model is None else model.name
    raise BundleError(
        f"Cannot open {folder}: it is an adapter for {trained_on}, expected a bundle or a base. "
        f"Give its base, in any quantisation: qaflora run {base} --adapter {folder} PROMPT"
    )


def _known(trained_on: str) -> Model | None:
    """Find the model of the registry that an adapter's config names."""
    same = (m for m in load_registry().values() if plain_name(m.name) == plain_name(trained_on))
    return next(same, None)


def _trained_on(adapter: str) -> str | None:
    """What the config of a PEFT or MLX folder says; None for anything else."""
    from qaflora_edge.peft.config import is_mlx, read_fields
    from qaflora_edge.peft.folder import adapter_folder

    try:
        fields = read_fields(adapter_folder(expanded(adapter)))
    except QafloraError:  # what reads the adapter will say what is wrong
        return None
    name = fields.get("model" if is_mlx(fields) else "base_model_name_or_path")
    return one_line(name[:200]) if isinstance(name, str) and name.strip() else None
