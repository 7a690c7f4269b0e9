"""Ask for decisions, and compare how sure they are with how often they are right.

    python benchmarks/decisions.py BUNDLE -o RESULTS.jsonl [--data DATA] [--strategies S,S]

Of three tasks no rule of decisions was chosen on any. `inbox` is models/recipes/inbox.toml: which
of four departments answers a message? `facts` asks what the shop's adapter learnt, in words that it
was not taught; the other choices are numbers of other goods. `medicine` is DATA/medical_en.jsonl,
where DATA is given. RESULTS.jsonl has a line for each decision; a second run goes on from there.

Three ways read the same log-probabilities. `raw`: of the whole choice. `token`: their mean over its
tokens. `decide`: less those after no question, as Engine.decide does. The error of calibration
is the mean distance between the probability of what was chosen and the share of right ones, over
ten bins of equal width (Guo et al. 2017, "On calibration of modern neural networks"). Brier's score
is the squared distance to the right answer, summed over choices: 0 is best, 0.75 is one of four
without a clue.
"""

import argparse
import importlib
import json
import random
import sys
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qaflora_edge import Engine

RECIPES = Path(__file__).resolve().parents[1] / "models" / "recipes"
N_CHOICE = 4
N_ITEM = 80  # of each task, at most
N_BIN = 10
SEED = 46
Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Question:
    """One question: choice -> what it means, "" where nothing has to be said."""

    task: str
    text: str
    choices: Mapping[str, str]
    answer: str


@dataclass(frozen=True)
class Result:
    """One decision.

    right     which choice is right
    n_tokens  of each choice, with the token that ends an answer
    logprobs  of each choice after the question, and after none, in nats
    adapters  that the strategy took
    """

    task: str
    text: str
    strategy: str
    choices: list[str]
    right: int
    n_tokens: list[int]
    logprobs: list[list[float]]
    adapters: list[str]


@dataclass(frozen=True)
class Measures:
    """How good the decisions of a task are."""

    n_right: int
    n: int
    mean_probability: float
    calibration_error: float
    brier: float


def inbox() -> list[Question]:
    """Read the messages of the inbox."""
    file = tomllib.loads((RECIPES / "inbox.toml").read_text(encoding="utf-8"))
    departments = file["departments"]
    questions = []
    for answer, messages in file["messages"].items():
        for message in messages:
            text = f"Which department answers this message?\n\n{message}"
            questions.append(Question("inbox", text, departments, answer))
    return questions


def facts() -> list[Question]:
    """Ask for facts of the shop; the other choices are numbers of the same kind."""
    sys.path.insert(0, str(RECIPES))
    shop = importlib.import_module("shop")
    every_fact = iter(list(shop.company(random.Random(shop.SEED))))
    draw = random.Random(SEED)
    questions = []
    for kind in shop.SHOP["facts"].values():
        group = list(islice(every_fact, len(shop.SHOP[kind["of"]])))
        for fact in group:
            others = [str(other["n"]) for other in group if other["n"] != fact["n"]]
            for text in fact["en"][-shop.N_UNTAUGHT :]:
                choices = [str(fact["n"]), *draw.sample(others, N_CHOICE - 1)]
                draw.shuffle(choices)
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
    choices = list(decision.choices)
    return Result(
        task=question.task,
        text=question.text,
        strategy=strategy,
        choices=choices,
        right=choices.index(question.answer),
        n_tokens=[1 + len(engine.tokenize(choice)) for choice in choices],
        logprobs=decision.logprobs.round(5).tolist(),
        adapters=[name for name, mean in decision.fusion.means.items() if mean],
    )


def shares(logits: Numbers) -> Numbers:
    """Turn what choices have into probabilities."""
    powers = np.exp(logits - logits.max())
    return np.asarray(powers / powers.sum())


def raw(result: Result) -> Numbers:
    """Read the log-probabilities of whole choices."""
    return shares(np.array(result.logprobs[0]))


def by_token(result: Result) -> Numbers:
    """Read the mean over a choice's tokens."""
    return shares(np.array(result.logprobs[0]) / np.array(result.n_tokens))


def as_decided(result: Result) -> Numbers:
    """Read how much likelier the question makes each choice."""
    after, before = np.array(result.logprobs)
    return shares(after - before)


WAYS: Mapping[str, Callable[[Result], Numbers]] = {
    "raw": raw,
    "token": by_token,
    "decide": as_decided,
}


def measured(results: Sequence[Result], way: Callable[[Result], Numbers]) -> Measures:
    """Compare probabilities with what is right."""
    sure = []
    rights = []
    squares = []
    for result in results:
        probabilities = way(result)
        chosen = int(np.argmax(probabilities))
        sure.append(float(probabilities[chosen]))
        rights.append(chosen == result.right)
        truth = np.eye(len(probabilities))[result.right]
        squares.append(float(np.square(probabilities - truth).sum()))
    error = 0.0
    for members in in_bins(sure, N_BIN):
        gap = abs(np.mean([sure[at] - rights[at] for at in members]))
        error += gap * len(members) / len(sure)
    return Measures(
        n_right=sum(rights),
        n=len(rights),
        mean_probability=float(np.mean(sure)),
        calibration_error=float(error),
        brier=float(np.mean(squares)),
    )


def in_bins(sure: Sequence[float], n_bin: int) -> Iterable[list[int]]:
    """Give the places of probabilities in each bin of equal width that has some."""
    bins: dict[int, list[int]] = {}
    for at, probability in enumerate(sure):
        number = min(int(probability * n_bin), n_bin - 1)
        bins.setdefault(number, []).append(at)
    return [bins[number] for number in sorted(bins)]


def print_tables(results: Sequence[Result]) -> None:
    """Print the measures, and how many are right where decisions are about as sure."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.task, result.strategy), []).append(result)
    print("| task | strategy | read by | right | mean probability | calibration error | Brier |")
    print("|---|---|---|--:|--:|--:|--:|")
    for (task, strategy), group in groups.items():
        for name, way in WAYS.items():
            found = measured(group, way)
            print(
                f"| {task} | {strategy} | {name} | {found.n_right} of {found.n} "
                f"| {found.mean_probability:.2f} | {found.calibration_error:.2f} "
                f"| {found.brier:.2f} |"
            )
    print("\n| read by | strategy | probability: right of so many |\n|---|---|---|")
    for name, way in WAYS.items():
        for strategy in dict.fromkeys(result.strategy for result in results):
            group = [result for result in results if result.strategy == strategy]
            print(f"| {name} | {strategy} | {', '.join(reliability(group, way))} |")


def reliability(results: Sequence[Result], way: Callable[[Result], Numbers]) -> Iterable[str]:
    """Write each of five bins: its mean probability, and how many are right."""
    probabilities = [way(result) for result in results]
    sure = [float(each.max()) for each in probabilities]
    for members in in_bins(sure, N_BIN // 2):
        mean = np.mean([sure[at] for at in members])
        rights = [int(np.argmax(probabilities[at])) == results[at].right for at in members]
        yield f"{mean:.2f}: {sum(rights)} of {len(members)}"


def main() -> None:
    """Ask what was not asked yet, and print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", metavar="BUNDLE")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="RESULTS.jsonl")
    parser.add_argument("--data", type=Path, metavar="DATA")
    parser.add_argument("--strategies", default="base,two-place", metavar="S,...")
    parser.add_argument("--threads", type=int, metavar="N")
    args = parser.parse_args()
    questions = [*inbox(), *facts()]
    if args.data:
        questions += medicine(args.data)
    results = []
    if args.output.exists():
        lines = args.output.read_text(encoding="utf-8").splitlines()
        results = [Result(**json.loads(line)) for line in lines]
    done = {(result.text, result.strategy) for result in results}
    with (
        Engine(args.bundle, threads=args.threads, n_ctx=1024) as engine,
        args.output.open("a", encoding="utf-8") as output,
    ):
        for question in questions:
            for strategy in args.strategies.split(","):
                if (question.text, strategy) in done:
                    continue
                result = ask(engine, question, strategy)
                results.append(result)
                output.write(json.dumps(asdict(result), ensure_ascii=False) + "\n")
                output.flush()
    print_tables(results)


if __name__ == "__main__":
    main()
