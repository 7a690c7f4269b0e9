"""qaflora weights and decide: what a prompt weighs, and which of several answers it has"""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from qaflora_edge.cli import options as cli
from qaflora_edge.cli.output import print_json
from qaflora_edge.cli.places import bundle_folder
from qaflora_edge.cli.prompts import read_prompts
from qaflora_edge.errors import OutputFileError
from qaflora_edge.files import write_text_atomic
from qaflora_edge.show import picture, print_heatmap, visible, who_spoke

if TYPE_CHECKING:
    from qaflora_edge.answering.decide import Decision
    from qaflora_edge.arrays import F64


@cli.command(
    'qaflora weights demo "Una camisa cuesta 12 euros. ¿Cuánto cuestan 3 camisas?"',
    'qaflora weights demo "How many legs do three dogs have?" --plot weights.svg',
)
@cli.bundle_argument
@click.argument("prompt")
@cli.json_option()
@click.option(
    "--plot",
    help="Draw what is printed to FILE.svg, which a browser shows.",
    **cli.out_file(".svg"),
)
@cli.shared_options
def weights(
    bundle: str, prompt: str, as_json: bool, plot: Path | None, options: cli.SharedOptions
) -> None:
    """Show what each adapter weighs for a prompt.

    Prints who speaks, the mean weight of each adapter, and a heatmap of adapters and layers. PROMPT
    `-` reads stdin. Nothing is generated. `qaflora run --prompts FILE --json -n 0` weighs a file.
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
        print_json(fusion.to_dict())
    else:
        print_heatmap(fusion)
    if plot is not None:
        write_text_atomic(plot, picture(fusion, text, subject(bundle)))


def subject(bundle: str) -> str:
    """The names of a bundle and its base, which stand above a picture."""
    from qaflora_edge.formats.bundle import is_base, read_bundle_text

    folder = bundle_folder(bundle)
    if is_base(folder):
        return folder.name
    text = read_bundle_text(folder)
    base = text.base
    return f"{text.name or folder.name} on {base.name or base.registry or base.hub or base.file}"


@cli.command(
    'qaflora decide demo "Which of these is a fruit?" --choice apple --choice hammer',
    "qaflora decide demo --prompts tickets.txt --choice billing --choice technical --json",
)
@cli.bundle_argument
@click.argument("question", required=False)
@click.option(
    "--choice",
    "choices",
    multiple=True,
    required=True,
    metavar="TEXT",
    help="One of the possible answers; repeatable, 255 at most.",
)
@click.option(
    "--prompts",
    "prompts_path",
    metavar="FILE",
    help="Decide each question of FILE: one a line, or in a .jsonl file one object with "
    '"prompt" a line. `-` is stdin.',
)
@click.option(
    "--compare", is_flag=True, help="Also show what the base and each adapter choose alone."
)
@cli.json_option("Print one JSON object for each question.")
@cli.shared_options
def decide(
    bundle: str,
    question: str | None,
    choices: tuple[str, ...],
    prompts_path: str | None,
    compare: bool,
    as_json: bool,
    options: cli.SharedOptions,
) -> None:
    """Choose one of several answers, with probabilities.

    QUESTION `-` reads stdin. Nothing is generated: each choice is scored as the answer.
    """
    if (question is None) == (prompts_path is None):
        raise click.UsageError("Give either QUESTION or --prompts FILE.")
    questions = read_prompts(prompts_path) if prompts_path else [cli.read_prompt(str(question))]
    with cli.open_engine(bundle, options) as engine:
        for text in questions:
            decision = engine.decide(text, choices, compare=compare)
            if as_json:
                prompt = {} if prompts_path is None else {"prompt": text}
                print_json(prompt | decision.to_dict())
                continue
            mix = who_spoke(decision.fusion)
            click.echo(f"{_line(decision, decision.probabilities)}   [{mix}]")
            for name, probabilities in decision.by_adapter.items():
                click.echo(f"  {name}: {_line(decision, probabilities)}")


def _line(decision: "Decision", probabilities: "F64") -> str:
    shares = decision.named(probabilities).items()
    return "   ".join(f"{visible(name)} {share:.2f}" for name, share in shares)
