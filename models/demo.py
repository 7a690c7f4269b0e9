"""Ask the demo bundle three questions: what the base, each adapter alone and the mix answer.

`make demo` runs this after it has installed the package and pulled the base. By hand:

    qaflora pull smollm2-135m-instruct
    python models/demo.py
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from qaflora_edge import Engine, QafloraError
from qaflora_edge.cli.compare import ask, expand, table
from qaflora_edge.show.heatmap import print_heatmap

BUNDLE = Path(__file__).resolve().parent / "demo"
MAX_TOKENS = 64
# What it is about, the question, and what a right answer has in it.
QUESTIONS = (
    (
        "A maths problem",
        "Lucy writes 9 letters every week. How many letters does Lucy write in 4 weeks?",
        "36",
    ),
    (
        "A medical question with choices",
        "Malaria is spread by\nA. Mosquitoes\nB. Flies\nC. Ticks\nD. Water",
        "A. Mosquitoes",
    ),
    ("A question in Spanish", "¿Cuál es la capital de Perú?", "Lima"),
)


def main() -> None:
    say("qaflora-edge demo: one base and three adapters (math, es, med), mixed anew per question.")
    say("The base has 135 million parameters and little Spanish, the adapters were trained for")
    say("minutes: on most questions all of them are wrong. These three were picked because the mix")
    say("makes the right answer likelier than the base does, and mostly writes it. It shows how")
    say("mixing works, not how good an answer can be.")
    with Engine(BUNDLE, n_ctx=512, n_parallel=4) as engine:
        for what, question, right in QUESTIONS:
            show(engine, what, question, right)
    say("The rows with `single:` are one adapter alone, the last row is the mix. A column of the")
    say("heatmap is a layer: the higher, the more an adapter weighs there. med weighs much in all")
    say("of them: it was trained hard and moves the base on every question. --strategy calibrated")
    say(
        "is for that. Your own:  qaflora compare models/demo QUESTION  or  qaflora chat models/demo"
    )


def show(engine: Engine, what: str, question: str, right: str) -> None:
    """The answers to one question side by side, and the weights of the mix."""
    say(f"\n--- {what}; right is {right} ---\n{question}\n")
    tokens = engine.chat_tokens([{"role": "user", "content": question}])
    strategies = expand("base,single,qa-flora", engine.adapters)
    answers = ask(engine, tokens, strategies, {"max_tokens": MAX_TOKENS})
    say(table(answers))
    say("")
    print_heatmap([("", answers[-1][1])])


def say(text: str) -> None:
    click.echo(text)


if __name__ == "__main__":
    try:
        main()
    except QafloraError as error:
        sys.exit(f"Error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
