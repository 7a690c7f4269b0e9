"""qaflora weights"""

import json
from pathlib import Path

import click

from qaflora_edge.cli import options as cli
from qaflora_edge.cli.progress import progress_bars
from qaflora_edge.cli.prompts import Prompt, read_prompts
from qaflora_edge.errors import OutputFileError, PromptError
from qaflora_edge.files import write_text_atomic


@cli.command(
    'qaflora weights demo "Una camisa cuesta 12 euros. ¿Cuánto cuestan 3 camisas?"',
    "qaflora weights demo --prompts prompts.txt --plot weights.svg",
)
@click.argument("bundle", **cli.BUNDLE)
@click.argument("prompt", required=False)
@click.option(
    "--prompts",
    "prompts_path",
    metavar="FILE",
    help="Weigh each prompt of FILE instead of PROMPT: one a line, or in a .jsonl file one object "
    'with "prompt" and perhaps "name" a line. `-` reads lines from stdin.',
)
@click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object, with --prompts one a line."
)
@click.option(
    "--plot",
    help="Draw the weights, a panel per prompt, to FILE.svg. A browser shows it, and a cell's "
    "numbers where one points at it.",
    **cli.out_file(".svg"),
)
@cli.shared_options
def weights(
    bundle: str,
    prompt: str | None,
    prompts_path: str | None,
    as_json: bool,
    plot: Path | None,
    options: cli.SharedOptions,
) -> None:
    """Show what each adapter weighs for a prompt.

    Prints who speaks, the mean weight of each adapter, and a heatmap of adapters and layers. PROMPT
    `-` reads stdin. Nothing is generated.
    """
    if (prompt is None) == (prompts_path is None):
        raise click.UsageError("Give either PROMPT or --prompts FILE.")
    cli.check_outputs([plot], [] if prompts_path is None else [Path(prompts_path)])
    if prompts_path is not None:
        prompts = read_prompts(prompts_path)
    else:
        prompts = [Prompt(cli.read_prompt(str(prompt)))]
    weighed = []
    with cli.open_engine(bundle, options) as engine, progress_bars() as tell:
        if plot is not None and not engine.adapters:
            raise OutputFileError(
                f"Cannot draw {plot}: the bundle has no adapters, expected one or more. Add one "
                "with `qaflora bundle add`."
            )
        queries = []  # all fit, or none is shown
        for asked in prompts:
            try:
                queries.append(engine.read(cli.question(asked.text, options)))
            except PromptError as error:
                if asked.where is None:
                    raise
                raise PromptError(f"{asked.where}: {error}") from error
        for asked, query in zip(prompts, queries, strict=True):
            fusion = engine.weights(query)
            weighed.append((asked, fusion))
            if len(queries) > 1:
                tell("Weighing", len(weighed), len(queries))
            if as_json:
                name = {} if asked.name is None else {"name": asked.name}
                asked_with = {} if prompt is not None else {"prompt": asked.text, **name}
                click.echo(json.dumps({**asked_with, **fusion.to_dict()}))
    if not as_json:
        from qaflora_edge.show.text import print_heatmap

        is_one = len(weighed) == 1
        print_heatmap([("" if is_one else asked.label, fusion) for asked, fusion in weighed])
    if plot is not None:
        from qaflora_edge.show.pages import picture

        labelled = [(asked.label, fusion) for asked, fusion in weighed]
        write_text_atomic(plot, picture(labelled, subject(bundle)))


def subject(bundle: str) -> str:
    """The names of a bundle and its base, which stand above a picture."""
    from qaflora_edge.formats.bundle import is_base, read_bundle_text

    folder = cli.bundle_folder(bundle)
    if is_base(folder):
        return folder.name
    text = read_bundle_text(folder)
    base = text.base
    return f"{text.name or folder.name} on {base.name or base.registry or base.hub or base.file}"
