"""qaflora decide"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from qaflora_edge.cli import options as cli
from qaflora_edge.cli.answers import print_json
from qaflora_edge.cli.prompts import read_prompts
from qaflora_edge.show.text import visible, who_spoke

if TYPE_CHECKING:
    from qaflora_edge.arrays import F64
    from qaflora_edge.inference.decision import Decision


@cli.command(
    'qaflora decide demo "Which of these is a fruit?" --choice apple --choice hammer',
    "qaflora decide demo --prompts tickets.txt --choice billing --choice technical --json",
)
@click.argument("bundle", **cli.BUNDLE)
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
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for each question.")
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


def _line(decision: Decision, probabilities: F64) -> str:
    shares = decision.named(probabilities).items()
    return "   ".join(f"{visible(name)} {share:.2f}" for name, share in shares)
