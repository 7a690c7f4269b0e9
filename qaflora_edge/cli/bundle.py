"""qaflora bundle create, add, remove, rename, base, calibrate, samples, show and verify"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qaflora_edge.cli.answers import print_json
from qaflora_edge.cli.base_choice import choose_base
from qaflora_edge.cli.options import (
    BUNDLE,
    bundle_folder,
    check_prompt,
    click_option,
    command,
    completed_by,
)
from qaflora_edge.cli.progress import progress_bars
from qaflora_edge.cli.prompts import read_text
from qaflora_edge.config import OWN, SHARED
from qaflora_edge.files import one_line

if TYPE_CHECKING:
    from qaflora_edge.engine import Engine

NOTES = {
    "source": "Where an adapter comes from.",
    "license": "An adapter's licence.",
    "description": "What an adapter was trained for.",
}


@click.group()
def bundle() -> None:
    """Make, change, show and verify bundles.

    A bundle is a folder with bundle.json and adapters/NAME.gguf for one base. It can be copied,
    zipped or put on a hub.
    """


def _pairs(
    ctx: click.Context, param: click.Parameter, values: tuple[str, ...]
) -> list[tuple[str, str]]:
    pairs = []
    for value in values:
        name, equals, text = value.partition("=")
        if not (name and equals and text):
            raise click.BadParameter(f"{value!r} is not of the form {param.metavar}.")
        pairs.append((name, text))
    return pairs


def _notes(prefix: str, **keywords: Any) -> Callable[..., Any]:
    """Options of what is noted of an adapter; the command gets them as one argument `note`."""

    def add_options(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def collected(**given: Any) -> Any:
            return command(note={key: given.pop(f"note_{key}") for key in NOTES}, **given)

        decorated: Callable[..., Any] = collected
        for key, meaning in reversed(NOTES.items()):
            decorated = click.option(f"{prefix}{key}", f"note_{key}", help=meaning, **keywords)(
                decorated
            )
        return decorated

    return add_options


def _by_default(
    key: str, value: str | None, meaning: str, *, unset: str = ""
) -> Callable[..., Any]:
    """A shared option that is written into a bundle."""
    return click_option(replace(SHARED[key], default=value, help=meaning, unset=unset), "bundle")


_BY_EVIDENCE = "two-place; qa-flora with --no-calibrate, or where an adapter adapts none of q, k, v"


_outtype = click_option(replace(OWN["convert"]["outtype"], help="Type of what is converted."), "")
_from_now_on = click.option("--strategy", help="Used by default from now on.  [default: as it is]")
_calibrate = click.option(
    "--calibrate/--no-calibrate",
    default=True,
    show_default=True,
    help="Measure typical divergences, which the strategies two-place and calibrated need.",
)


@command(
    "qaflora bundle create my-bundle --base base.gguf \\",
    "    --adapter math=peft/math --adapter es=es.gguf",
    group=bundle,
)
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--base",
    metavar="BASE.gguf",
    help="The base, the name of a registry model that was pulled, or a Hub reference "
    "(owner/name/file.gguf). A name makes a bundle that works on any machine that has pulled it.  "
    "[default: what the adapters name]",
)
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    required=True,
    metavar="NAME=PATH",
    callback=_pairs,
    help="An adapter: a PEFT folder, which is converted, an adapter .gguf, or a Hub reference to "
    "one of them (owner/name, with @revision to pin it); repeatable.",
)
@click.option("--name", help="The bundle's name.  [default: the folder's]")
@click.option("--description", default="", help="What the bundle is for.")
@click.option("--license", default="", help="The licence of the bundle.")
@click.option(
    "--system",
    "system_path",
    metavar="FILE",
    help="Begin conversations that have no system message with the text in FILE.",
)
@_outtype
@_by_default("strategy", None, "Used by default.", unset=_BY_EVIDENCE)
@_by_default("lens", "norm", "How a layer's state is read by default.")
@_by_default("pool", "last", "The token or tokens that are weighed by default.")
@_notes("--adapter-", metavar="NAME=TEXT", multiple=True, callback=_pairs)
@_calibrate
def create(
    folder: Path,
    base: str | None,
    adapters: list[tuple[str, str]],
    note: dict[str, Any],
    system_path: str | None,
    calibrate: bool,
    **options: Any,
) -> None:
    """Make a bundle from a base and adapters.

    DIR must not exist. It appears when every adapter is in it; when something fails before, nothing
    is left. Measuring comes last: a bundle that is not measured works, and `qaflora bundle
    calibrate` finishes it.
    """
    from qaflora_edge.bundles.create import create_bundle

    notes: dict[str, dict[str, str]] = {}
    for key, pairs in note.items():
        for adapter, text in pairs:
            notes.setdefault(adapter, {})[key] = text
    if system_path is not None:
        options["system"] = check_prompt(read_text(system_path).strip())
    base = choose_base(base, [path for _, path in adapters])
    is_there = os.path.lexists(folder)
    options["engine"] = _engine() if calibrate else None
    try:
        with progress_bars() as progress:
            create_bundle(folder, base, adapters, notes=notes, progress=progress, **options)
    except BaseException:
        if folder.is_dir() and not is_there:
            click.echo(
                f"The bundle {folder} is made and works, weighed by {_strategy(folder)}; its "
                f"adapters are not measured. Finish it with `qaflora bundle calibrate {folder}`.",
                err=True,
            )
        raise
    made = f"Created the bundle {folder} with {_counted(len(adapters))}"
    click.echo(f"{made}, weighed by {_strategy(folder)}.", err=True)


@command(
    "qaflora bundle add my-bundle med=peft/med",
    "qaflora bundle add my-bundle law=owner/law-lora@v1",
    group=bundle,
)
@click.argument("folder", **BUNDLE)
@click.argument("pairs", metavar="NAME=PATH", nargs=-1, required=True, callback=_pairs)
@_outtype
@_notes("--", metavar="TEXT")
@_from_now_on
@_calibrate
def add(
    folder: str,
    pairs: list[tuple[str, str]],
    note: dict[str, str | None],
    strategy: str | None,
    outtype: str,
    calibrate: bool,
) -> None:
    """Add adapters to a bundle.

    NAME=PATH gives an adapter its name in the bundle; PATH is what `qaflora bundle create
    --adapter` takes. The bundle changes in one step, when all has worked; when something fails, it
    is as it was.
    """
    from qaflora_edge.bundles.edit import add_adapters

    path = bundle_folder(folder)
    given = {key: text for key, text in note.items() if text is not None}
    with progress_bars() as progress:
        add_adapters(
            path,
            pairs,
            engine=_engine() if calibrate else None,
            outtype=outtype,
            note=given,
            strategy=strategy,
            progress=progress,
        )
    for name, _ in pairs:
        click.echo(f"Added the adapter {name} to {path}.", err=True)


@command("qaflora bundle remove my-bundle med", group=bundle)
@click.argument("folder", **BUNDLE)
@click.argument("name", shell_complete=completed_by("complete_adapter"))
@_from_now_on
def remove(folder: str, name: str, strategy: str | None) -> None:
    """Remove an adapter from a bundle, with its file.

    NAME is the adapter's name in the bundle.
    """
    from qaflora_edge.bundles.edit import remove_adapter

    path = bundle_folder(folder)
    remove_adapter(path, name, strategy=strategy)
    click.echo(f"Removed the adapter {name} from {path}.", err=True)


@command("qaflora bundle rename my-bundle med medicine", group=bundle)
@click.argument("folder", **BUNDLE)
@click.argument("old", shell_complete=completed_by("complete_adapter"))
@click.argument("new")
def rename(folder: str, old: str, new: str) -> None:
    """Rename an adapter of a bundle, with its file.

    OLD is the adapter's name, NEW the one it gets.
    """
    from qaflora_edge.bundles.edit import rename_adapter

    path = bundle_folder(folder)
    rename_adapter(path, old, new)
    click.echo(f"Renamed the adapter {old} of {path} to {new}.", err=True)


@command(
    "qaflora bundle base my-bundle ~/models/base.gguf",
    "qaflora bundle base my-bundle owner/base-GGUF/base-q4_k_m.gguf",
    group=bundle,
)
@click.argument("folder", **BUNDLE)
@click.argument("base", metavar="BASE")
def base(folder: str, base: str) -> None:
    """Say where a bundle's base lies.

    For a bundle or a base that was moved. BASE is what `qaflora bundle create --base` takes.
    It must be the file that the bundle was made with: it is hashed and compared. A file inside
    the bundle's folder goes with it; a name of `qaflora models` or a Hub reference is right on
    every machine.
    """
    from qaflora_edge.bundles.edit import set_base

    path = bundle_folder(folder)
    with progress_bars() as progress:
        set_base(path, base, progress=progress)
    click.echo(f"The base of {path} is {base}.", err=True)


@command(
    "qaflora bundle calibrate my-bundle",
    "qaflora bundle calibrate my-bundle --strategy two-place",
    group=bundle,
)
@click.argument("folder", **BUNDLE)
@_from_now_on
def calibrate(folder: str, strategy: str | None) -> None:
    """Measure the typical divergences that a bundle lacks.

    The strategies two-place and calibrated need them. For a bundle with adapters put in with
    --no-calibrate, or measured by another version on other texts.
    """
    from qaflora_edge.bundles.edit import calibrate as calibrate_bundle

    path = bundle_folder(folder)
    with progress_bars() as progress:
        is_new = calibrate_bundle(path, _engine(), strategy=strategy, progress=progress)
    done = "Measured the adapters of" if is_new else "Every adapter was measured already in"
    click.echo(f"{done} {path}, weighed by {_strategy(path)}.", err=True)


@command(
    "qaflora bundle samples my-bundle math questions.txt",
    "qaflora bundle samples my-bundle es preguntas.jsonl",
    group=bundle,
)
@click.argument("folder", **BUNDLE)
@click.argument("name", metavar="ADAPTER", shell_complete=completed_by("complete_adapter"))
@click.argument("file", metavar="FILE")
def samples(folder: str, name: str, file: str) -> None:
    """Give sample texts of an adapter.

    The strategy centroid needs them of each adapter: questions like those that ADAPTER is for, a
    few dozen, 1,000 at most. FILE holds one a line, or in a .jsonl file one object a line with
    `prompt`. They are read by the base under its chat template, and only the mean of their
    embeddings is kept in bundle.json, as many numbers as the base is wide, with how many texts
    there were and their hash. What was given before is replaced.
    """
    from qaflora_edge.bundles.edit import set_samples
    from qaflora_edge.cli.prompts import read_prompts

    path = bundle_folder(folder)
    texts = [prompt.text for prompt in read_prompts(file)]
    with progress_bars() as progress:
        set_samples(path, name, texts, _engine(), progress=progress)
    click.echo(f"Embedded {len(texts)} sample texts of {name} in {path}.", err=True)


@command("qaflora bundle show models/demo", group=bundle)
@click.argument("folder", **BUNDLE)
@click.option("--json", "as_json", is_flag=True, help="Print bundle.json, and where the base is.")
def show(folder: str, as_json: bool) -> None:
    """Show what a bundle says of itself.

    The files need not be there: nothing is hashed or loaded.
    """
    from qaflora_edge.bundles.open import recorded_base
    from qaflora_edge.formats.bundle import read_bundle_text

    path = bundle_folder(folder)
    if not as_json:
        click.echo(describe(path))
        return
    text = read_bundle_text(path)
    base_path = recorded_base(path, text.base)
    print_json({**text.raw, "base_path": None if base_path is None else str(base_path)})


def describe(folder: Path) -> str:
    """Give a bundle's description as lines to read; its files need not be there."""
    from qaflora_edge.bundles.measure import unmeasured
    from qaflora_edge.bundles.open import how_to_get_base, known_of, recorded_base
    from qaflora_edge.formats.bundle import read_bundle_text

    text = read_bundle_text(folder)
    base, known, names = text.base, known_of(text), [adapter.name for adapter in text.adapters]
    base_path = recorded_base(folder, base)
    where = str(base_path) if base_path else f"not here: {how_to_get_base(folder, base)}"
    is_measured = names and not unmeasured(text.fusion, names)
    lines = [
        f"{text.name or folder.name}" + (f": {text.description}" if text.description else ""),
        f"licence    {text.license or 'not stated'}",
        "base       "
        + (f"{base.name}: " if base.name else "")
        + f"{base.architecture}, {base.n_layer} layers, {base.n_embd} wide, "
        f"vocabulary {base.n_vocab}, {base.size_bytes / 1e6:.0f} MB",
        f"           {where}",
        f"fusion     {known.strategy}, lens {known.lens}, pool {known.pool}"
        + (", calibrated" if is_measured else ""),
        *([f"samples    of {', '.join(known.centroids)}"] if known.centroids else []),
        *([f"system     {text.system}"] if text.system else []),
        f"adapters   {len(text.adapters)}",
    ]
    for adapter in text.adapters:
        lines.append(
            f"  {adapter.name:<8} rank {adapter.rank}, alpha {adapter.alpha:g}, on "
            f"{', '.join(adapter.targets)}"
        )
        notes = [adapter.description, adapter.source, adapter.license]
        if adapter.trained_on:
            lines.append(f"  {'':<8} trained on {adapter.trained_on}")
        if any(notes):
            lines.append(f"  {'':<8} {'; '.join(note for note in notes if note)}")
    return "\n".join(map(one_line, lines))


@command("qaflora bundle verify models/demo", group=bundle)
@click.argument("folder", **BUNDLE)
def verify(folder: str) -> None:
    """Hash every file of a bundle again and check all shapes.

    Includes the base. Ends with exit code 1 and the first difference when there is one.
    """
    from qaflora_edge.bundles.open import verify_bundle

    with progress_bars() as progress:
        verified = verify_bundle(bundle_folder(folder), progress)
    adapters = _counted(len(verified.adapter_paths))
    click.echo(f"{verified.folder}: the base and {adapters} are the recorded ones.")


def _engine() -> type[Engine]:
    from qaflora_edge.engine import Engine

    return Engine


def _strategy(folder: Path) -> str:
    from qaflora_edge.bundles.open import known_of
    from qaflora_edge.formats.bundle import read_bundle_text

    return known_of(read_bundle_text(folder)).strategy


def _counted(n_adapter: int) -> str:
    return "1 adapter" if n_adapter == 1 else f"{n_adapter} adapters"
