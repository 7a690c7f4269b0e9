"""qaflora bundle create, add, remove, base, calibrate, teach, check, show and verify"""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from qaflora_edge.cli import options as cli
from qaflora_edge.cli.examples import (
    counted,
    lessons_of,
    named,
    read_lesson,
    teach_all,
    with_card,
)
from qaflora_edge.cli.output import progress_bars, say
from qaflora_edge.cli.places import bundle_folder, missing_base
from qaflora_edge.cli.prompts import read_text
from qaflora_edge.cli.settings import ADAPTER, OWN
from qaflora_edge.errors import BundleError
from qaflora_edge.files import AnyPath, one_line
from qaflora_edge.show import N_ALL, N_TOP, others


@click.group()
def bundle() -> None:
    """Make, change, show and verify bundles.

    A bundle is a folder: bundle.json and adapters/NAME.gguf for one base. Copy, zip or share it.
    """


def _pairs(ctx: click.Context, param: click.Parameter, values: Any) -> cli.Pairs:
    return cli.adapter_pairs(values)


_FOLDER = cli.BUNDLE | {"callback": lambda ctx, param, value: bundle_folder(value)}
_folder = click.argument("folder", **_FOLDER)
_adapters: dict[str, Any] = {"multiple": True, "metavar": ADAPTER.metavar, "callback": _pairs}
_outtype = cli.click_option(replace(OWN["convert"]["outtype"], help="Convert to this type."), "")
_from_now_on = click.option("--strategy", help="Used by default from now on.  [default: as it is]")
_calibrate = click.option(
    "--calibrate/--no-calibrate",
    default=True,
    show_default=True,
    help="Measure what the strategy needs to know of each adapter; this happens once.",
)


@cli.command(
    "qaflora bundle create my-bundle --base base.gguf \\",
    "    --adapter math=peft/math --adapter es=es.gguf",
    "qaflora bundle create taught --base base.gguf --adapter math=peft/math \\",
    "    --examples math=questions.txt --about 'math=Solves word problems.'",
    "qaflora bundle create mine --modelfile Modelfile",
    group=bundle,
)
@click.argument("folder", metavar="DIR", type=cli.PATH)
@click.option(
    "--base",
    metavar="BASE.gguf",
    help="The base, the name of a registry model that was pulled, or a Hub reference "
    "(owner/name/file.gguf). A name makes a bundle that works on any machine that has pulled it.",
)
@click.option(
    "--adapter",
    "adapters",
    **_adapters,
    help="An adapter: a PEFT folder, which is converted, an adapter .gguf, or a Hub reference to "
    "one of them (owner/name, with @revision to pin it); repeatable. NAME is the folder's or "
    "file's unless given.",
)
@click.option(
    "--modelfile",
    "modelfile_path",
    metavar="FILE",
    type=cli.PATH,
    help="Take base, adapters, system message, parameters and licence from a Modelfile of Ollama, "
    "in place of --base, --adapter and --system.",
)
@click.option(
    "--examples",
    multiple=True,
    metavar="NAME=FILE",
    help="Questions that this adapter should answer, as `qaflora bundle teach` takes them; "
    "repeatable. Those of a PEFT folder's model card (`widget`) are taken where none are given.",
)
@click.option(
    "--about",
    multiple=True,
    metavar="NAME=TEXT",
    help="What this adapter is for, in a sentence; repeatable. Without it the first sentence of a "
    "PEFT folder's model card is taken.",
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
@click.option(
    "--strategy",
    help="Used by default.  [default: relay; qa-flora with --no-calibrate, or where an "
    "adapter adapts none of q, k, v]",
)
@_calibrate
def create(
    folder: Path,
    base: str | None,
    adapters: cli.Pairs,
    modelfile_path: Path | None,
    system_path: str | None,
    examples: Sequence[str],
    about: Sequence[str],
    calibrate: bool,
    **options: Any,
) -> None:
    """Make a bundle from a base and adapters, or from a Modelfile.

    DIR must not exist. When something fails, nothing is left. Measuring comes last and happens
    once; a bundle that is not measured works, and `qaflora bundle calibrate` finishes it.
    """
    from qaflora_edge.bundles.create import create_bundle
    from qaflora_edge.bundles.modelfile import read_modelfile
    from qaflora_edge.bundles.open import unmeasured
    from qaflora_edge.engine import Engine
    from qaflora_edge.formats.bundle import read_bundle_text

    pairs: Sequence[tuple[str, AnyPath]] = adapters
    source: AnyPath
    if modelfile_path is not None:
        if base or adapters or system_path:
            raise click.UsageError("--modelfile stands in place of --base, --adapter and --system.")
        modelfile = read_modelfile(modelfile_path)
        for note in modelfile.notes:
            say(note)
        source = modelfile.base
        pairs = modelfile.adapters
        options["license"] = options["license"] or modelfile.license
        options["system"] = modelfile.system
        options["examples"] = modelfile.examples
        options["sampling"] = modelfile.sampling
    elif not adapters:
        raise click.UsageError("Missing option '--adapter' or '--modelfile'.")
    elif base is None:
        raise missing_base([path for _, path in adapters])
    else:
        source = base
    if system_path is not None:
        options["system"] = cli.check_prompt(read_text(system_path).strip())
    files = named("--examples", examples, "FILE")
    descriptions = named("--about", about, "TEXT")
    lessons = lessons_of([name for name, _ in pairs], files, descriptions)
    is_there = os.path.lexists(folder)
    options["engine"] = Engine if calibrate else None
    try:
        with progress_bars(or_lines=True) as progress:
            create_bundle(folder, source, pairs, progress=progress, **options)
    except BaseException:
        if folder.is_dir() and not is_there:
            say(unmeasured(folder, read_bundle_text(folder)))
        raise
    if calibrate:  # without it the base is not loaded unasked
        lessons = list(map(with_card, lessons, (path for _, path in pairs)))
    teach_all(folder, lessons)
    weighed = f"weighed by {_strategy(folder)}"
    say(f"Created the bundle {folder}, {weighed}. Try: qaflora chat {folder}")


@cli.command(
    "qaflora bundle add my-bundle med=peft/med",
    "qaflora bundle add my-bundle law=owner/law-lora@v1",
    group=bundle,
)
@_folder
@click.argument("pairs", metavar="[[NAME=]PATH]...", nargs=-1, callback=_pairs)
@click.option("--adapter", "adapters", **_adapters, help="Add this one too; repeatable.")
@_outtype
@click.option("--source", help="Where the adapters come from.")
@click.option("--license", help="The adapters' licence.")
@click.option("--description", help="What the adapters were trained for.")
@_from_now_on
@_calibrate
def add(
    folder: Path, pairs: cli.Pairs, adapters: cli.Pairs, calibrate: bool, **options: Any
) -> None:
    """Add adapters to a bundle.

    [NAME=]PATH is as in `qaflora bundle create --adapter`. A failure leaves the bundle as it was.
    """
    from qaflora_edge.bundles.edit import add_adapters
    from qaflora_edge.engine import Engine

    if not (pairs := [*pairs, *adapters]):
        raise click.UsageError("Give an adapter, as [NAME=]PATH.")
    notes = {key: options.pop(key) for key in ("source", "license", "description")}
    options["note"] = {key: text for key, text in notes.items() if text is not None}
    options["engine"] = Engine if calibrate else None
    with progress_bars(or_lines=True) as progress:
        add_adapters(folder, pairs, progress=progress, **options)
    for name, _ in pairs:
        say(f"Added the adapter {name} to {folder}.")


@cli.command("qaflora bundle remove my-bundle med", group=bundle)
@_folder
@click.argument("name")
@_from_now_on
def remove(folder: Path, name: str, strategy: str | None) -> None:
    """Remove the adapter NAME from a bundle, with its file."""
    from qaflora_edge.bundles.edit import remove_adapter

    remove_adapter(folder, name, strategy=strategy)
    say(f"Removed the adapter {name} from {folder}.")


@cli.command(
    "qaflora bundle base my-bundle ~/models/base.gguf",
    "qaflora bundle base my-bundle owner/base-GGUF/base-q4_k_m.gguf",
    group=bundle,
)
@_folder
@click.argument("base", metavar="BASE")
def base(folder: Path, base: str) -> None:
    """Say where a bundle's base lies.

    BASE is what `qaflora bundle create --base` takes. It must be the file that the bundle was made
    with. A file inside the bundle's folder goes with it; a name or reference is right everywhere.
    """
    from qaflora_edge.bundles.edit import set_base

    set_base(folder, base)
    say(f"The base of {folder} is {base}.")


@cli.command(
    "qaflora bundle calibrate my-bundle",
    "qaflora bundle calibrate my-bundle --strategy relay",
    group=bundle,
)
@_folder
@_from_now_on
def calibrate(folder: Path, strategy: str | None) -> None:
    """Measure what is typical of each adapter, for relay, two-place and calibrated.

    --strategy makes one the default and measures what it needs: for two-place passes of the base
    alone. Without it all is measured.
    """
    from qaflora_edge.bundles.edit import calibrate as calibrate_bundle
    from qaflora_edge.engine import Engine

    with progress_bars(or_lines=True) as progress:
        is_new = calibrate_bundle(folder, Engine, strategy=strategy, progress=progress)
    done = "Measured the adapters of" if is_new else "Every adapter was measured already in"
    say(f"{done} {folder}, weighed by {_strategy(folder)}.")


@cli.command(
    "qaflora bundle teach my-bundle math questions.txt",
    "qaflora bundle teach my-bundle base everyday.txt",
    "qaflora bundle teach my-bundle math --forget",
    group=bundle,
)
@_folder
@click.argument("name")
@click.argument("path", metavar="[FILE]", required=False)
@click.option("--forget", is_flag=True, help="Forget the examples of NAME.")
@click.option(
    "--no-text",
    is_flag=True,
    help="Keep the base's states of the questions alone; answers are not kept then either.",
)
def teach(folder: Path, name: str, path: str | None, forget: bool, no_text: bool) -> None:
    """Teach a bundle which questions are for the adapter NAME, or for base.

    FILE has a question a line, or JSON lines with `question` or `messages`, and `answer` where
    `qaflora bundle check` should test it; - is stdin. Three to ten questions are enough; of more
    than 32 lines an even spread of 32 is taken.
    """
    from qaflora_edge.bundles import taught
    from qaflora_edge.engine import Engine

    if forget == (path is not None):
        raise click.UsageError("Give either a FILE of questions or --forget.")
    if path is None:
        say(f"{name} has forgotten {counted(taught.forget(folder, name))}.")
        return
    lesson = read_lesson(name, path)
    with progress_bars() as tell, Engine(folder) as engine:
        tell("Reading examples", 0, 1)
        answers = None if no_text else lesson.answers
        n_taught = engine.teach(lesson.questions, name, answers=answers, keep_text=not no_text)
        tell("Reading examples", 1, 1)
    say(f"{name} has {counted(n_taught)} in {folder}, {len(lesson.questions)} of {lesson.source}.")


@cli.command("qaflora bundle check demo", group=bundle)
@_folder
def check(folder: Path) -> None:
    """Check that each adapter acts, and test examples that have an answer.

    An adapter that moves nothing, or makes noise, ends the command with an error. An answer is
    right if it has the expected one in it, as whole words, in any case and spacing. Each question
    is asked of the adapter alone, of the bundle and of the base.
    """
    from qaflora_edge.engine import Engine
    from qaflora_edge.evaluation.check import check_adapters, tested_of
    from qaflora_edge.show import columns

    rows = [["", "acts", "tested", "alone", "in the bundle", "base", "taken instead"]]
    faults = []
    tested = tested_of(folder)
    with Engine(folder, n_parallel=4) as engine, progress_bars() as tell:
        names = [*engine.adapters, *(["base"] if "base" in tested else [])]
        for done, found in enumerate(check_adapters(engine, tested, names)):
            tell("Checking adapters", done, len(names))
            others = ", ".join(f"{other} {count}" for other, count in found.others.most_common())
            counts = [found.n_tested, found.n_alone, found.n_mixed, found.n_base]
            shown = [str(count) if found.n_tested else "-" for count in counts]
            rows.append([found.name, "no" if found.fault else "yes", *shown, others or "-"])
            if found.fault:
                faults.append(f"{found.name} {found.fault}.")
        tell("Checking adapters", len(names), len(names))
    click.echo("\n".join(columns(rows)))
    if faults:
        raise BundleError(
            f"Not every adapter of {folder} acts, as expected. {' '.join(faults)} Look whether it "
            "is the adapter's newest file, of this base, and whole."
        )


@cli.command("qaflora bundle show demo", group=bundle)
@_folder
def show(folder: Path) -> None:
    """Show what a bundle says of itself; its files need not be there."""
    click.echo(describe(folder))


def describe(folder: Path) -> str:
    """Give a bundle's description as lines to read; its files need not be there."""
    from qaflora_edge.bundles.open import how_to_get_base, recorded_base, unmeasured
    from qaflora_edge.bundles.taught import counts_of
    from qaflora_edge.formats.bundle import read_bundle_text
    from qaflora_edge.formats.gguf import plain_name
    from qaflora_edge.weighing.weigher import known_of

    text = read_bundle_text(folder)
    base = text.base
    known = known_of(text)
    taught = ", ".join(f"{name} {n_example}" for name, n_example in counts_of(folder).items())
    base_name = plain_name(base.name or base.architecture)
    sampling = ", ".join(f"{name} {value}" for name, value in text.sampling.items())
    where = recorded_base(folder, base) or f"not here: {how_to_get_base(folder, base)}"
    lines = [
        f"{text.name or folder.name}" + (f": {text.description}" if text.description else ""),
        f"licence    {text.license or 'not stated'}",
        f"base       {base_name}, {base.n_layer} layers, {base.n_embd} wide, "
        f"{base.size_bytes / 1e6:.0f} MB",
        f"           {where}",
        f"fusion     {known.strategy}, lens {known.lens}, pool {known.pool}",
        *([f"system     {text.system}"] if text.system else []),
        *([f"examples   {len(text.examples)} messages"] if text.examples else []),
        *([f"sampling   {sampling}"] if sampling else []),
        *([f"taught     {taught} example questions"] if taught else []),
        f"adapters   {len(text.adapters)}",
    ]
    shown = text.adapters[:N_TOP] if len(text.adapters) > N_ALL else text.adapters
    width = max((len(adapter.name) for adapter in shown), default=0)
    for adapter in shown:
        notes = filter(None, (adapter.description, adapter.source, adapter.license))
        modules = ",".join(
            kind.removeprefix("attn_").removeprefix("ffn_") for kind in adapter.targets
        )
        lines.append(
            f"  {adapter.name:<{width}}  rank {adapter.rank:<3} alpha {adapter.alpha:<4g} "
            f"{modules}  {'; '.join(notes)}".rstrip()
        )
    if note := unmeasured(folder, text):
        lines.append(note)
    lines += [f"  {count}, in --json" for count in others(len(text.adapters) - len(shown))]
    return "\n".join(map(one_line, lines))


@cli.command("qaflora bundle verify demo", group=bundle)
@_folder
def verify(folder: Path) -> None:
    """Hash every file of a bundle and its base again, and check all shapes."""
    from qaflora_edge.bundles.open import verify_bundle

    with progress_bars() as progress:
        n_adapter = len(verify_bundle(folder, progress).adapters)
    click.echo(f"{folder}: the base and {n_adapter} adapters are the recorded ones.")


def _strategy(folder: Path) -> str:
    from qaflora_edge.formats.bundle import read_bundle_text
    from qaflora_edge.weighing.weigher import known_of

    return known_of(read_bundle_text(folder)).strategy
