"""Ask for decisions, and compare how sure they are with how often they are right.

    python benchmarks/decisions.py BUNDLE -o RESULTS.jsonl [--data DATA] [--strategies S,S]

Of three tasks no rule of decisions was chosen on any. `inbox` is models/recipes/inbox.toml: which
of four departments answers a message? `facts` asks what the shop's adapter learnt, with numbers of
other goods as choices. `medicine` is DATA/medical_en.jsonl, where DATA is given. RESULTS.jsonl has
a line for each decision; a second run goes on from there. The error of calibration is the mean
distance between probability and share of right ones, over ten bins of equal width (Guo et al.
2017, "On calibration of modern neural networks").
"""

import argparse
import importlib
import json
import random
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from qaflora_edge import Engine

RECIPES = Path(__file__).resolve().parents[1] / "models" / "recipes"
N_CHOICE = 4
N_ITEM = 40  # of facts and medicine, at most
N_BIN = 10
SEED = 46


@dataclass(frozen=True)
class Question:
    """One question: choice -> what it means, "" where nothing has to be said."""

    task: str
    text: str
    choices: Mapping[str, str]
    answer: str


@dataclass(frozen=True)
class Result:
    """What was chosen, how sure, and whether it is right."""

    task: str
    text: str
    strategy: str
    choice: str
    probability: float
    is_right: bool


def inbox() -> list[Question]:
    """Read the messages of the inbox."""
    file = tomllib.loads((RECIPES / "inbox.toml").read_text(encoding="utf-8"))
    departments = file["departments"]
    questions = []
    for answer, messages in file["messages"].items():
        for message in messages:
            questions.append(Question("inbox", message, departments, answer))
    return questions


def facts() -> list[Question]:
    """Ask for facts of the shop; the other choices are numbers of the same kind."""
    sys.path.insert(0, str(RECIPES))
    shop = importlib.import_module("shop")
    draw = random.Random(shop.SEED)
    every_fact = iter(list(shop.company(draw)))
    questions = []
    for kind in shop.SHOP["facts"].values():
        group = list(islice(every_fact, len(shop.SHOP[kind["of"]])))
        for fact in group:
            others = [str(other["n"]) for other in group if other["n"] != fact["n"]]
            choices = [str(fact["n"]), *draw.sample(others, N_CHOICE - 1)]
            draw.shuffle(choices)
            for text in fact["en"][-shop.N_UNTAUGHT :]:
                named = dict.fromkeys(choices, "")
                questions.append(Question("facts", text, named, str(fact["n"])))
    draw.shuffle(questions)
    return questions[:N_ITEM]


def medicine(data: Path) -> list[Question]:
    """Read questions of an exam."""
    questions = []
    lines = (data / "medical_en.jsonl").read_text(encoding="utf-8").splitlines()
    for line in lines[:N_ITEM]:
        item = json.loads(line)
        choices = dict.fromkeys(item["choices"], "")
        answer = item["choices"][item["answer"]]
        questions.append(Question("medicine", item["question"], choices, answer))
    return questions


def ask(engine: Engine, question: Question, strategy: str) -> Result:
    """Ask for one decision."""
    decision = engine.decide(question.text, question.choices, strategy=strategy)
    return Result(
        task=question.task,
        text=question.text,
        strategy=strategy,
        choice=decision.choice,
        probability=float(decision.probabilities.max()),
        is_right=decision.choice == question.answer,
    )


def calibration_error(probabilities: Sequence[float], rights: Sequence[bool]) -> float:
    """Compute the expected error of calibration, from 0 to 1."""
    sure = np.asarray(probabilities)
    right = np.asarray(rights, float)
    bins = np.minimum((sure * N_BIN).astype(int), N_BIN - 1)
    error = 0.0
    for number in range(N_BIN):
        members = bins == number
        if members.any():
            gap = abs(sure[members].mean() - right[members].mean())
            error += members.mean() * gap
    return error


def print_table(results: Sequence[Result]) -> None:
    """Print how many are right, how sure they are, and the error, by task and strategy."""
    print("| task | strategy | right | mean probability | calibration error |")
    print("|---|---|--:|--:|--:|")
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.task, result.strategy), []).append(result)
    for (task, strategy), group in groups.items():
        rights = [result.is_right for result in group]
        sure = [result.probability for result in group]
        error = calibration_error(sure, rights)
        right = f"{sum(rights)} of {len(group)}"
        print(f"| {task} | {strategy} | {right} | {np.mean(sure):.2f} | {error:.2f} |")


def main() -> None:
    """Ask what was not asked yet, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", metavar="BUNDLE")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="RESULTS.jsonl")
    parser.add_argument("--data", type=Path, metavar="DATA")
    parser.add_argument("--strategies", default="base,two-place", metavar="S,...")
    args = parser.parse_args()
    questions = [*inbox(), *facts()]
    if args.data:
        questions += medicine(args.data)
    results = []
    if args.output.exists():
        lines = args.output.read_text(encoding="utf-8").splitlines()
        results = [Result(**json.loads(line)) for line in lines]
    done = {(result.task, result.text, result.strategy) for result in results}
    with (
        Engine(args.bundle) as engine,
        args.output.open("a", encoding="utf-8") as output,
    ):
        for question in questions:
            for strategy in args.strategies.split(","):
                if (question.task, question.text, strategy) in done:
                    continue
                result = ask(engine, question, strategy)
                results.append(result)
                output.write(json.dumps(asdict(result), ensure_ascii=False) + "\n")
                output.flush()
    print_table(results)


if __name__ == "__main__":
    main()
