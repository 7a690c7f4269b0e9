"""qaflora weights"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import click

from qaflora_edge.cli.options import (
    SharedOptions,
    example,
    open_engine,
    prompt_tokens,
    read_prompt,
    shared_options,
)

PLOT_SUFFIXES = (".png", ".html", ".svg")


def _check_plot(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    if value is not None and value.suffix.lower() not in PLOT_SUFFIXES:
        raise click.BadParameter(f"{str(value)!r} does not end in {', '.join(PLOT_SUFFIXES)}.")
    return value


@click.command(
    epilog=example(
        """
        qaflora weights models/demo "Cuatro cajas tienen 12 huevos cada una. ¿Cuántos hay?"
        qaflora weights models/demo - --plot weights.svg < question.txt
        """
    )
)
@click.argument("bundle", metavar="DIR")
@click.argument("prompt")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option(
    "--plot",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    callback=_check_plot,
    help="Draw the weights to FILE.png, FILE.html or FILE.svg.",
)
@shared_options
def weights(
    bundle: str, prompt: str, as_json: bool, plot: Path | None, options: SharedOptions
) -> None:
    """Show what each adapter weighs for a prompt.

    Prints the mean weight of each adapter and a strip with its weight at every layer. PROMPT `-`
    reads stdin. Nothing is generated, so the sampling options have no effect here.
    """
    text = read_prompt(prompt)
    if plot is not None:
        from qaflora_edge.cli.plot import check_can_plot

        check_can_plot(plot)
    with open_engine(bundle, options) as engine:
        fusion = engine.weights(prompt_tokens(engine, text, options))
    if plot is not None:
        from qaflora_edge.cli.plot import write_plot

        write_plot(plot, fusion)
    if as_json:
        click.echo(json.dumps(fusion.to_dict()))
        return
    from qaflora_edge.cli.heatmap import heatmap, terminal_colour

    width = shutil.get_terminal_size().columns
    colour = terminal_colour(sys.stdout)
    click.echo(
        heatmap(fusion, width=width, encoding=sys.stdout.encoding, colour=colour), color=True
    )
