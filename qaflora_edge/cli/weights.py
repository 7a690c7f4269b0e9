"""qaflora weights"""

import json
from pathlib import Path

import click

from qaflora_edge.cli import options as cli
from qaflora_edge.errors import OutputFileError
from qaflora_edge.files import write_text_atomic


@cli.command(
    'qaflora weights demo "Una camisa cuesta 12 euros. ¿Cuánto cuestan 3 camisas?"',
    'qaflora weights demo "How many legs do three dogs have?" --plot weights.svg',
)
@click.argument("bundle", **cli.BUNDLE)
@click.argument("prompt")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option(
    "--plot",
    help="Draw the weights to FILE.svg. A browser shows it, and a cell's numbers where one points "
    "at it.",
    **cli.out_file(".svg"),
)
@cli.shared_options
def weights(
    bundle: str, prompt: str, as_json: bool, plot: Path | None, options: cli.SharedOptions
) -> None:
    """Show what each adapter weighs for a prompt.

    Prints who speaks, the mean weight of each adapter, and a heatmap of adapters and layers. PROMPT
    `-` reads stdin. Nothing is generated; `qaflora run --prompts FILE --json -n 0` weighs each line
    of a file.
    """
    cli.check_outputs([plot], [])
    text = cli.read_prompt(prompt)
    with cli.open_engine(bundle, options) as engine:
        if plot is not None and not engine.adapters:
            raise OutputFileError(
                f"Cannot draw {plot}: the bundle has no adapters, expected one or more. Add one "
                "with `qaflora bundle add`."
            )
        fusion = engine.weights(engine.read(cli.question(text, options)))
    if as_json:
        click.echo(json.dumps(fusion.to_dict()))
    else:
        from qaflora_edge.show.text import print_heatmap

        print_heatmap(fusion)
    if plot is not None:
        from qaflora_edge.show.picture import picture

        write_text_atomic(plot, picture(fusion, text, subject(bundle)))


def subject(bundle: str) -> str:
    """The names of a bundle and its base, which stand above a picture."""
    from qaflora_edge.formats.bundle import is_base, read_bundle_text

    folder = cli.bundle_folder(bundle)
    if is_base(folder):
        return folder.name
    text = read_bundle_text(folder)
    base = text.base
    return f"{text.name or folder.name} on {base.name or base.registry or base.hub or base.file}"
