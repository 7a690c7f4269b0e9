"""qaflora compare"""

import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from qaflora_edge.ask import Ask, Weighing
from qaflora_edge.cli import options as cli
from qaflora_edge.cli.output import answer_dict, print_json, progress_bars
from qaflora_edge.show import can_show, visible, who_spoke

if TYPE_CHECKING:
    from qaflora_edge.engine import Engine
    from qaflora_edge.weighing.plan import FusionWeights

# A strategy, its weights, and what `qaflora run --json` prints of its answer.
Answer = tuple[str, "FusionWeights", dict[str, Any]]
# A comma between two strategies; those within manual:NAME=W,NAME=W stand before NAME=.
_COMMA = re.compile(r",(?![^,:]*=)")


@cli.command(
    'qaflora compare demo "What is the capital of France, and which river flows through it?"',
    "qaflora compare demo QUESTION --strategies base,static,two-place",
)
@cli.bundle_argument
@click.argument("question")
@click.option(
    "--strategies",
    "ways",
    metavar="NAME,NAME,...",
    help="What to compare, in this order; `single` is each adapter alone.  [default: the "
    "strategy, base, single]",
)
@cli.json_option()
@cli.shared_options
def compare(
    bundle: str, question: str, ways: str | None, as_json: bool, options: cli.SharedOptions
) -> None:
    """Show what several strategies answer, side by side.

    The base, each adapter alone, and the mix answer the same question. Each answer shows who spoke.
    QUESTION `-` reads stdin. Several answers are computed together (--parallel), which rounds
    otherwise than one alone: --parallel 1 answers as `qaflora run` does.
    """
    text = cli.read_prompt(question)
    with cli.open_engine(bundle, options) as engine:
        strategies = expand(ways or f"{engine.strategy},base,single", engine.adapters)
        prompt = engine.read(cli.question(text, options))
        answers = answer_all(engine, Ask(prompt, sampling=options.sampling), strategies)
    if as_json:
        facts = [{"strategy": strategy} | facts for strategy, _, facts in answers]
        print_json({"prompt": text, "answers": facts})
    else:
        click.echo(table(answers))


def expand(ways: str, adapters: Sequence[str]) -> list[str]:
    """The strategies that a list of them names, each once; `single` is one for each adapter."""
    from qaflora_edge.weighing.strategy import parse_strategy

    strategies = []
    for way in map(str.strip, _COMMA.split(ways)):
        if way == "single":
            strategies += [f"single:{name}" for name in adapters]
        else:
            strategies.append(way)
    for strategy in strategies:
        parse_strategy(strategy, adapters)
    return list(dict.fromkeys(strategies))


def answer_all(engine: "Engine", ask: Ask, strategies: Sequence[str]) -> list[Answer]:
    """Answer under each strategy, in their order. Raises what the first one that failed did."""
    answers: dict[int, Answer] = {}
    asks = [replace(ask, weighing=Weighing(strategy)) for strategy in strategies]
    with progress_bars() as tell:
        for index, generation in engine.submit_many(asks):
            answers[index] = strategies[index], generation.fusion, answer_dict(generation)
            tell("Answering", len(answers), len(asks))
    return [answers[index] for index in range(len(strategies))]


def table(answers: Sequence[Answer], width: int | None = None) -> str:
    """Lay out answers as a table: strategy and mix on the left, the answer on the right.

    width  that of the terminal, unless given

    What a model wrote can move no cursor and change no colour.
    """
    from rich.box import HORIZONTALS
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=HORIZONTALS, show_lines=True, expand=True, padding=(0, 1))
    shown.add_column("strategy, mix", ratio=1, overflow="fold")
    shown.add_column("answer", ratio=3, overflow="fold")
    for strategy, fusion, facts in answers:
        text = facts["text"].strip() or "(nothing)"
        if facts["finish_reason"] == "length":
            text += "\n[cut at the limit of tokens]"
        mix = who_spoke(fusion)
        if not can_show(mix, sys.stdout.encoding):
            mix = mix.replace("×", "").replace("→", "to")
        way = "\n".join([strategy, *mix.split(" · ")])
        shown.add_row(Text(visible(way)), Text(visible(text)))
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(shown)
    return "\n".join(line.rstrip() for line in capture.get().splitlines() if line.strip())
