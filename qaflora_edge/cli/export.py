"""qaflora export"""

import os
from pathlib import Path

import click

from qaflora_edge.cli import options as cli
from qaflora_edge.errors import OutputFileError
from qaflora_edge.files import atomic_folder, atomic_path, what_is_at


@cli.command(
    "qaflora export demo -o mix.gguf --strategy manual:math=0.7,es=0.3",
    'qaflora export demo -o mix --peft --prompt "Una camisa cuesta 12 euros."',
)
@click.argument("bundle", **cli.BUNDLE)
@click.option("-o", "--output", required=True, help="What to write.", **cli.out_file(metavar="OUT"))
@click.option("--prompt", metavar="TEXT", help="Weigh for this prompt; `-` reads stdin.")
@click.option("--peft", "is_peft", is_flag=True, help="Write a PEFT folder.")
@cli.own_options
@cli.shared_options
def export(
    bundle: str,
    output: Path,
    prompt: str | None,
    is_peft: bool,
    outtype: str,
    options: cli.SharedOptions,
) -> None:
    """Write a mix as one adapter.

    OUT is an adapter GGUF, which llama.cpp applies with --lora. Its rank is the sum of the ranks of
    those that weigh anything. Strategies that look at the prompt need --prompt.
    """
    from qaflora_edge.bundles.open import load_bundle
    from qaflora_edge.convert.mix import mix_modules, write_mix, write_peft_mix
    from qaflora_edge.show.text import who_spoke
    from qaflora_edge.weighing.strategy import parse_strategy

    failure = f"Cannot write {output}"
    if os.path.lexists(output):
        raise OutputFileError(f"{failure}: it {what_is_at(output)} already. Choose another name.")
    opened = load_bundle(cli.bundle_folder(bundle))
    strategy = options.strategy or opened.known.strategy
    if prompt is None and parse_strategy(strategy, [*opened.adapters]).strategy.is_probed:
        raise click.UsageError(
            f"{strategy} weighs by the prompt: give --prompt TEXT, or --strategy manual:NAME=W."
        )
    text = None if prompt is None else cli.read_prompt(prompt)
    with cli.open_engine(bundle, options) as engine:
        query = engine.read([0] if text is None else cli.question(text, options))
        fusion = engine.weights(query)
    who = who_spoke(fusion)
    modules = mix_modules(opened.adapters, fusion.weights)
    if is_peft:
        with atomic_folder(output, failure) as temporary:
            write_peft_mix(temporary, opened.header, modules)
    else:
        with atomic_path(output) as temporary:
            write_mix(temporary, opened.header, modules, who, outtype)
    rank = max(module.b.shape[-1] for module in modules)
    click.echo(f"Wrote {output}: {who}; rank {rank}.", err=True)
