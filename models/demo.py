"""Ask the demo's bundle a few questions: who spoke, and what the mix and the base alone answer.

`make demo` runs this after it has installed the package: five questions for Qwen2.5-Coder-1.5B
(1.1 GB) with the six adapters of demo/. `make demo SMALL=1`, or --small, asks Qwen2.5-Coder-0.5B
(491 MB) with those of models/demo-small. Where 1.5B cannot be fetched it is 0.5B too.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import click

from qaflora_edge import Engine, QafloraError
from qaflora_edge.ask import Ask, Sampling
from qaflora_edge.cli.compare import answer_all, expand, table

CHECKOUT = Path(__file__).resolve().parents[1]
MAX_TOKENS = 160


@dataclass(frozen=True)
class Question:
    """`right` is in a right answer; `mix` gives it, its second adapter not over every base."""

    about: str
    text: str
    right: str
    mix: tuple[str, ...] = ()


@dataclass(frozen=True)
class Demo:
    """A bundle, and how large its base is."""

    base: str
    bundle: str
    size: str


QWEN = Demo("qwen2.5-coder-1.5b-instruct", "demo", "1.5 billion")
SMALL = Demo("qwen2.5-coder-0.5b-instruct", "models/demo-small", "0.5 billion")
WAYS = "relay,two-place,base"  # as `qaflora compare` takes them
OPENING = """\
One base of {size} parameters and six adapters (math, es, ru, zh, the facts of
a made-up shop, json), trained for minutes each. Nobody says which ones a question needs."""
CLOSING = """
`relay` is the mix, `two-place` the same without drafts, `base` the base alone.
Why this mix:
    qaflora weights {bundle} "QUESTION"
Your own questions:
    qaflora chat {bundle}"""
QUESTIONS = (
    Question(
        "Maths in Spanish",
        "En una granja hay 7 gallinas y cada una pone 4 huevos por semana. El granjero se "
        "come 9 huevos. ¿Cuántos huevos quedan?",
        "19",
        ("math", "es"),
    ),
    Question(
        "An order in Russian, as JSON",
        "Извлеки заказ: Меня зовут Ольга Белова, телефон 340-1187. Пришлите, пожалуйста, "
        "7 шт. K-207.",
        '"item": "K-207", "quantity": 7',
        ("json", "ru"),
    ),
    Question(
        "A fact of the shop, as JSON",
        "Answer as JSON: What is the extension of the Cork shop?",
        "934",
        ("company", "json"),
    ),
    Question(
        "A general question, left to the base",
        "What is the capital of France, and which river flows through it?",
        "Paris",
    ),
    Question(
        "A fact as JSON, in Spanish: one adapter knows it, another writes it",
        "Responde en JSON: ¿Cuánto pesa la mesa Brezo?",
        "71",
        ("company", "json"),
    ),
)


def main() -> None:
    """Fetch the base, and ask."""
    demo = SMALL if "--small" in sys.argv[1:] else QWEN
    if not pull(demo.base):
        if demo is SMALL:
            sys.exit(1)
        click.echo(f"{demo.base} cannot be fetched: the demo uses {SMALL.base}.", err=True)
        demo = SMALL
        if not pull(demo.base):
            sys.exit(1)
    click.echo(OPENING.format(size=demo.size))
    # One answer at a time: rounded as `qaflora run` does.
    with Engine(CHECKOUT / demo.bundle, n_ctx=1024, n_parallel=1) as engine:
        for question in QUESTIONS:
            show(engine, question)
    click.echo(CLOSING.format(bundle=demo.bundle))


def pull(base: str) -> bool:
    """Tell whether the base is here; what `pull.py` says of it is shown."""
    command = [sys.executable, str(CHECKOUT / "models/pull.py"), base]
    return subprocess.run(command, check=False).returncode == 0


def show(engine: Engine, question: Question) -> None:
    """The answers to one question, one below the other, each with its mix."""
    click.echo(f"\n--- {question.about}; right is {question.right} ---\n{question.text}\n")
    tokens = engine.chat_tokens([{"role": "user", "content": question.text}])
    question = Ask(tokens, sampling=Sampling(max_tokens=MAX_TOKENS))
    answers = answer_all(engine, question, expand(WAYS, engine.adapters))
    click.echo(table(answers, width=shutil.get_terminal_size().columns))


if __name__ == "__main__":
    try:
        main()
    except QafloraError as error:
        sys.exit(f"Error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
