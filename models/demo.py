"""Ask the demo's bundle a few questions: who spoke, and what the mix and the base alone answer.

`make demo` runs this after it has installed the package: five questions for Qwen2.5-Coder-0.5B
(491 MB) with the six adapters of demo/. `make demo SMALL=1`, or --small, asks SmolLM2-135M (98 MB)
with the three of models/demo. Where Qwen cannot be fetched it is SmolLM2 too. `make demo LARGE=1`,
or --large, asks Qwen2.5-Coder-1.5B (1.1 GB) with six of the same subjects, models/demo-large.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import click

from qaflora_edge import Engine, QafloraError
from qaflora_edge.ask import Ask, Sampling
from qaflora_edge.cli.compare import answer_all, expand, table

CHECKOUT = Path(__file__).resolve().parents[1]
MAX_TOKENS = 160


@dataclass(frozen=True)
class Question:
    """`right` is in a right answer, and `mix` are the adapters that should give it."""

    about: str
    text: str
    right: str
    mix: tuple[str, ...] = ()


@dataclass(frozen=True)
class Demo:
    """A bundle, and what is asked of it. `ways` are strategies as `qaflora compare` takes them."""

    base: str
    bundle: str
    ways: str
    opening: str
    closing: str
    questions: tuple[Question, ...]


QWEN = Demo(
    base="qwen2.5-coder-0.5b-instruct",
    bundle="demo",
    ways="relay,two-place,base",
    opening="One base of 0.5 billion parameters and six adapters (math, es, ru, zh, the facts of\n"
    "a made-up shop, json), trained for minutes each. Nobody says which ones a question needs.",
    closing="`relay` is the mix, `two-place` the same without drafts, `base` the base alone.\n"
    "Why this mix:\n"
    '    qaflora weights demo "QUESTION"\n'
    "Your own questions:\n"
    "    qaflora chat demo",
    questions=(
        Question(
            "Maths in Spanish",
            "En una granja hay 7 gallinas y cada una pone 4 huevos por semana. El granjero se "
            "come 9 huevos. ¿Cuántos huevos quedan?",
            "19",
            ("math", "es"),
        ),
        Question(
            "An order in Russian, as JSON",
            "Извлеки заказ: Здравствуйте, меня зовут Ольга Белова. Пришлите, пожалуйста, артикул "
            "K-207, семь шт. Мой номер 340-1187.",
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
    ),
)
LARGE = replace(
    QWEN,
    base="qwen2.5-coder-1.5b-instruct",
    bundle="models/demo-large",
    opening=QWEN.opening.replace("0.5 billion", "1.5 billion"),
    closing=QWEN.closing.replace(" demo", " models/demo-large"),
    questions=(
        *QWEN.questions[:-1],
        replace(
            QWEN.questions[-1],
            text="Responde en JSON: ¿Cuánto cuesta el reloj Pavo?",
            right="58",
        ),
    ),
)
SMALL = Demo(
    base="smollm2-135m-instruct",
    bundle="models/demo",
    ways="qa-flora,base,single",
    opening="One base of 135 million parameters and three adapters (math, es, med). It is so\n"
    "small that all of them are wrong on most questions: these were picked. `make demo`\n"
    "without SMALL shows a base that knows more.",
    closing="`qa-flora` is the mix, `single:` are adapters alone. Your own questions:\n"
    "    qaflora chat models/demo",
    questions=(
        Question(
            "A maths problem",
            "Lucy writes 9 letters every week. How many letters does Lucy write in 4 weeks?",
            "36",
        ),
        Question(
            "A medical question with choices",
            "Malaria is spread by\nA. Mosquitoes\nB. Flies\nC. Ticks\nD. Water",
            "A. Mosquitoes",
        ),
        Question("A question in Spanish", "¿Cuál es la capital de Perú?", "Lima"),
    ),
)


def main() -> None:
    """Fetch the base, and ask."""
    demo = QWEN
    if "--large" in sys.argv[1:]:
        demo = LARGE
    if "--small" in sys.argv[1:]:
        demo = SMALL
    if not pull(demo.base):
        if demo is SMALL:
            sys.exit(1)
        click.echo(f"{demo.base} cannot be fetched: the demo uses {SMALL.base}.", err=True)
        demo = SMALL
        if not pull(demo.base):
            sys.exit(1)
    click.echo(demo.opening)
    # One answer at a time: rounded as `qaflora run` does.
    with Engine(CHECKOUT / demo.bundle, n_ctx=1024, n_parallel=1) as engine:
        for question in demo.questions:
            show(engine, question, demo.ways)
    click.echo(f"\n{demo.closing}")


def pull(base: str) -> bool:
    """Tell whether the base is here; what `qaflora pull` says of it is shown."""
    command = [sys.executable, "-m", "qaflora_edge", "pull", base]
    return subprocess.run(command, check=False).returncode == 0


def show(engine: Engine, question: Question, ways: str) -> None:
    """The answers to one question, one below the other, each with its mix."""
    click.echo(f"\n--- {question.about}; right is {question.right} ---\n{question.text}\n")
    tokens = engine.chat_tokens([{"role": "user", "content": question.text}])
    question = Ask(tokens, sampling=Sampling(max_tokens=MAX_TOKENS))
    answers = answer_all(engine, question, expand(ways, engine.adapters))
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
