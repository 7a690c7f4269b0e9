"""qaflora convert and export: adapter GGUFs out of PEFT folders and of mixes"""

import functools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qaflora_edge.cli import options as cli
from qaflora_edge.cli.output import progress_bars, say
from qaflora_edge.cli.places import bundle_folder, missing_base
from qaflora_edge.errors import OutputFileError
from qaflora_edge.files import atomic_path, what_is_at
from qaflora_edge.formats.names import plain_name

if TYPE_CHECKING:
    from qaflora_edge.convert.verify import ModuleCheck


@cli.command(
    "qaflora convert my-peft-adapter --base base.gguf",
    "qaflora convert my-peft-adapter --base base.gguf -o math.gguf --verify",
)
@click.argument("peft_dir")
@click.option(
    "--base",
    metavar="BASE.gguf",
    help="The base that the adapter was trained on: a file, the name of a registry model that was "
    "pulled, or a Hub reference (owner/name/file.gguf).",
)
@click.option(
    "-o",
    "--output",
    help="The file to write.  [default: the adapter's name, in this folder]",
    **cli.out_file(metavar="OUT.gguf"),
)
@cli.own_options
@click.option("--force", is_flag=True, help="Replace OUT.gguf where it exists.")
@click.option(
    "--verify",
    is_flag=True,
    help="Read the file back, compare A and B of each module with the source, and report the "
    "largest difference. The file is kept only if rounding to its type explains them all.",
)
def convert(
    peft_dir: str,
    base: str | None,
    output: Path | None,
    outtype: str,
    force: bool,
    verify: bool,
) -> None:
    """Convert a PEFT adapter to an adapter GGUF.

    PEFT_DIR holds adapter_config.json and adapter_model.safetensors, as PEFT, unsloth, axolotl and
    others save them, or adapters.safetensors of MLX. Of a folder with one sub-folder for each
    adapter, give PEFT_DIR/NAME. A Hub reference (owner/name) is fetched first. A feature that a
    plain LoRA cannot represent is refused by its name, and nothing is written then.
    """
    # Numpy multiplies in one thread, unless the user chose: others spin beside busy cores.
    if "numpy" not in sys.modules:  # it is read when numpy is loaded
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from qaflora_edge.bundles.source import find_adapter, find_base
    from qaflora_edge.convert.adapter import convert_adapter

    if output is None:
        [(name, _)] = cli.adapter_pairs([peft_dir])
        output = Path(f"{name}.gguf")
    if not force and os.path.lexists(output):
        raise OutputFileError(
            f"Cannot write {output}: it {what_is_at(output)} already. Choose another name, or "
            "replace it with --force."
        )
    if base is None:
        raise missing_base([peft_dir])
    label = "Converting and verifying" if verify else "Converting"
    with progress_bars() as tell:
        source = find_adapter(peft_dir)
        converted = convert_adapter(
            source.path,
            find_base(base)[0],
            output,
            outtype=outtype,
            verify=verify,
            name=source.name if source.hub else None,
            progress=functools.partial(tell, label),
        )
    if converted.checks:
        click.echo(_summary(converted.checks))
    say(f"Wrote {output} ({converted.size_bytes / 1e6:.1f} MB).")
    trained_on = converted.trained_on
    base_name = converted.base_name
    names = {plain_name(name) for name in (base_name, base) if name}
    if trained_on and base_name and plain_name(trained_on) not in names:
        say(
            f"Its config says that it was trained on {trained_on}; the base calls itself "
            f"{base_name[:200]!r}."
        )


def _summary(checks: "Sequence[ModuleCheck]") -> str:
    worst = max(checks, key=lambda check: check.of_allowed)
    difference = "none differs from its source"
    if worst.of_allowed > 0:
        difference = (
            f"the largest difference is {worst.largest_difference:.2g}, "
            f"{worst.of_allowed:.0%} of what rounding explains, in {worst.module}"
        )
    return f"Verified {len(checks)} modules: {difference}."


@cli.command(
    "qaflora export demo -o mix.gguf --strategy manual:math=0.7,es=0.3",
    'qaflora export demo -o mix.gguf --prompt "Una camisa cuesta 12 euros."',
)
@cli.bundle_argument
@click.option("-o", "--output", required=True, help="What to write.", **cli.out_file(metavar="OUT"))
@click.option("--prompt", metavar="TEXT", help="Weigh for this prompt; `-` reads stdin.")
@cli.own_options
@cli.shared_options
def export(
    bundle: str, output: Path, prompt: str | None, outtype: str, options: cli.SharedOptions
) -> None:
    """Write a mix as one adapter.

    OUT is an adapter GGUF, which llama.cpp applies with --lora. Its rank is the sum of the ranks of
    those that weigh anything. Strategies that look at the prompt need --prompt.
    """
    from qaflora_edge.bundles.open import load_bundle
    from qaflora_edge.convert.adapter import mix_modules, write_mix
    from qaflora_edge.show import who_spoke
    from qaflora_edge.weighing.strategy import parse_strategy

    if os.path.lexists(output):
        raise OutputFileError(
            f"Cannot write {output}: it {what_is_at(output)} already. Choose another name."
        )
    opened = load_bundle(bundle_folder(bundle))
    strategy = options.strategy or opened.known.strategy
    if prompt is None and parse_strategy(strategy, [*opened.adapters]).strategy.is_probed:
        raise click.UsageError(
            f"{strategy} weighs by the prompt: give --prompt TEXT, or --strategy manual:NAME=W."
        )
    question = None if prompt is None else cli.question(cli.read_prompt(prompt), options)
    with cli.open_engine(bundle, options) as engine:
        fusion = engine.weights(engine.read([0] if question is None else question))
    who = who_spoke(fusion)
    modules = mix_modules(opened.adapters, fusion.weights)
    with atomic_path(output) as temporary:
        write_mix(temporary, opened.header, modules, who, outtype)
    rank = max(module.b.shape[-1] for module in modules)
    say(f"Wrote {output}: {who}; rank {rank}.")
