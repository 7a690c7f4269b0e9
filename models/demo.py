"""Ask three questions of the demo bundle and show how its adapters are weighed for each.

`make demo` runs this after it has installed the package and pulled the base. By hand:

    qaflora pull smollm2-135m-instruct
    python models/demo.py
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import click

from qaflora_edge import Engine, QafloraError
from qaflora_edge.cli.heatmap import heatmap
from qaflora_edge.cli.show import terminal_size

BUNDLE = Path(__file__).resolve().parent / "demo"
MAX_TOKENS = 96

QUESTIONS = (
    (
        "a maths problem in English",
        "A baker fills 6 trays with 8 rolls each and sells 30 rolls. How many rolls are left?",
    ),
    ("a question in Spanish", "¿Qué se puede hacer en un día de lluvia?"),
    (
        "a medical question with choices",
        "A patient has chest pain that spreads to the left arm. Which organ is most likely "
        "affected?\nA. Liver\nB. Heart\nC. Kidney\nD. Spleen",
    ),
)


def main() -> None:
    say("qaflora-edge demo: one base and three adapters (math, es, med), mixed anew per question.")
    start = time.perf_counter()
    with Engine(BUNDLE, n_ctx=1024) as engine:
        seconds = time.perf_counter() - start
        say(f"Opened {engine.name}: {engine.n_layer} layers, in {seconds:.1f} s.")
        for what, question in QUESTIONS:
            ask(engine, what, question)
    say("\nqa-flora weighs by how far an adapter moves the base; an adapter trained hard, such as")
    say("med, moves it on every question. calibrated divides that by the adapter's usual move.")
    say("The base has 135 million parameters and little Spanish: look at the mix, not the wisdom.")
    say("Ask your own:  qaflora run models/demo 'Your question'   or   qaflora chat models/demo")


def ask(engine: Engine, what: str, question: str) -> None:
    """Stream the fused answer to one question, then show both ways of weighing it."""
    say(f"\n--- {what} ---\n{question}\n")
    tokens = engine.chat_tokens([{"role": "user", "content": question}])
    answer = engine.generate(tokens, max_tokens=MAX_TOKENS)
    for piece in answer:
        click.echo(piece, nl=False)
    timings = answer.timings
    say(
        f"\n\n[weighed in {timings.probe_ms:.0f} ms, prompt read in {timings.prefill_ms:.0f} ms, "
        f"{answer.n_completion} tokens at {timings.tokens_per_second:.1f} tok/s]"
    )
    for strategy in ("qa-flora", "calibrated"):
        fusion = engine.weights(tokens, strategy=strategy)
        width, _ = terminal_size(sys.stdout)
        say(heatmap(fusion, width=width, encoding=sys.stdout.encoding) + "\n")


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
