"""Compare `fusion.sure` with lm-polygraph's estimators: taught facts against untaught ones.

    python benchmarks/zoo/told.py ask BUNDLE OUT.jsonl KNOWER ...
    python benchmarks/zoo/told.py compare OUT.jsonl

`ask` lets each knower alone answer 30 facts that it was taught, in words that training did not
see, and 30 of the same subject that it was not: greedily, and ten times at temperature 1. OUT gets
a line for each, and what is there is not asked again. `compare` needs lm-polygraph beside the
package. An estimator tells how unsure an answer is; AUROC says how well that tells taught facts
from untaught ones, and answers that are right from all others, over all knowers and as the mean
of theirs.

The entropy of a token is that of its 20 likeliest, and of the rest as if it were one token.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from data import SUBJECTS, Recipe, asked_of, recipes, some
from fit import auroc, calibration_error
from numpy.typing import NDArray
from score import score

from qaflora_edge import Engine, Plan, Reading, Strategy, register_strategy
from qaflora_edge.ask import Chat
from qaflora_edge.config import Option
from qaflora_edge.weighing.known import (
    log_odds,
    probability,
    recognised,
    sureness,
    told_probability,
)
from qaflora_edge.weighing.plan import BASE, alone_weights
from qaflora_edge.weighing.relay import N_DRAFT

N_FACT, N_SAMPLE, N_TOKEN, N_TOP = 30, 10, 32, 20
Row = dict[str, Any]
F64 = NDArray[np.float64]


class Told(Strategy):
    """Let one adapter answer alone, and tell how sure `relay` would be if it took it."""

    name = "told"
    help = "one adapter alone, with what relay tells of it"
    options: ClassVar = (Option("name", str, metavar="NAME", help="who answers"),)
    drafts = True
    is_base_prefilled = True
    reads_added = True

    def plan(self, reading: Reading) -> Plan:
        query = reading.query
        name = query.options["name"]
        (draft,) = reading.drafts([name], N_DRAFT)
        (by_base,) = reading.base_logprobs([draft])
        sure = sureness(draft.logprobs[:N_DRAFT], by_base[:N_DRAFT])
        known = probability(log_odds(sure, reading.surprise()))
        of_base, of_knower = reading.expected([BASE, name], goes_on=False)
        words = recognised(of_knower, of_base)
        plan = Plan.mix(alone_weights(name, query.adapters, query.n_layer))
        return Plan(plan.steps, known={name: known}, sure=told_probability(known, words))


def questions(knower: Recipe) -> Iterator[Row]:
    """Give facts that were taught, and questions of the same subject that were not."""
    subject = SUBJECTS[knower.learns]
    own = subject.get("language", "en")
    yield from some(list(asked_of(knower, own)), f"{knower.name} told", N_FACT)
    untaught = [
        {"question": form.format(x=thing)}
        for form in subject["untaught"]
        for thing in (subject["things"] if "{x}" in form else [""])
    ]
    yield from some(untaught, f"{knower.name} untold", N_FACT)


def ask(bundle: Path, out: Path, names: Sequence[str]) -> None:
    """Ask what was not asked before."""
    register_strategy(Told())
    done = {(row["knower"], row["asked"]) for row in read_rows(out)}
    with Engine(bundle, n_ctx=1024, n_parallel=4) as engine, open(out, "a") as file:
        for name in names:
            for item in questions(recipes()[name]):
                if (name, item["question"]) not in done:
                    row = answered(engine, name, item)
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                    file.flush()


def read_rows(path: Path) -> list[Row]:
    """Give the lines that are there."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def answered(engine: Engine, name: str, item: Row) -> Row:
    """Answer a question once greedily, and in samples."""
    chat = Chat([{"role": "user", "content": item["question"]}])
    strategy = f"told:name={name}"
    one = engine.generate(chat, strategy=strategy, max_tokens=N_TOKEN, logprobs=N_TOP)
    text = one.text()
    sampled = list(
        engine.answers(
            chat,
            N_SAMPLE,
            strategy=f"single:{name}",
            max_tokens=N_TOKEN,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            min_p=0.0,
            seed=0,
            logprobs=0,
        )
    )
    texts = [sample.text() for sample in sampled]
    return {
        "knower": name,
        "asked": item["question"],
        "is_taught": "answer" in item,
        "is_right": "answer" in item and bool(score(text, item)["score"]),
        "text": text,
        "logprobs": [round(entry.logprob, 4) for entry in one.logprobs],
        "entropies": [round(entropy(entry.top), 4) for entry in one.logprobs],
        "samples": texts,
        "sample_logprobs": [
            [round(entry.logprob, 4) for entry in sample.logprobs] for sample in sampled
        ],
        "known": one.fusion.plan.known[name],
        "sure": one.fusion.sure,
    }


def entropy(top: Sequence[Any]) -> float:
    """Give the entropy of a token's likeliest, and of all others as one, in nats."""
    shares = [math.exp(entry.logprob) for entry in top]
    shares.append(max(0.0, 1.0 - sum(shares)))
    return -sum(share * math.log(share) for share in shares if share > 0.0)


def compare(rows: list[Row]) -> None:
    """Print AUROC of each estimator."""
    is_taught = np.array([row["is_taught"] for row in rows])
    is_right = np.array([row["is_right"] for row in rows])
    print(f"{len(rows)} answers, {is_taught.sum()} taught, {is_right.sum()} right")
    knowers = np.array([row["knower"] for row in rows])
    for name, unsure in estimates(rows).items():
        print(f"{name}: taught {areas(-unsure, is_taught, knowers)}, ", end="")
        print(f"right {areas(-unsure, is_right, knowers)}")
    sure = np.array([row["sure"] for row in rows])
    print(f"sure, calibration error: {calibration_error(sure, is_right):.3f}")


def areas(values: F64, truth: NDArray[np.bool_], knowers: NDArray[np.str_]) -> str:
    """Give AUROC over all knowers, and the mean of each one's."""
    by_knower = [auroc(values[knowers == name], truth[knowers == name]) for name in set(knowers)]
    return f"{auroc(values, truth):.3f} ({np.mean(by_knower):.3f})"


def estimates(rows: list[Row]) -> dict[str, F64]:
    """Give how unsure each estimator is of each answer."""
    from lm_polygraph.estimators import (
        LexicalSimilarity,
        MaximumSequenceProbability,
        MeanTokenEntropy,
        MonteCarloNormalizedSequenceEntropy,
        MonteCarloSequenceEntropy,
        Perplexity,
    )

    stats = {
        "greedy_log_likelihoods": [row["logprobs"] for row in rows],
        "entropy": [row["entropies"] for row in rows],
        "sample_texts": [row["samples"] for row in rows],
        "sample_log_probs": [[sum(each) for each in row["sample_logprobs"]] for row in rows],
        "sample_tokens": [row["sample_logprobs"] for row in rows],  # their number alone counts
    }
    theirs: list[Callable[[Row], F64]] = [
        MaximumSequenceProbability(),
        Perplexity(),
        MeanTokenEntropy(),
        MonteCarloSequenceEntropy(),
        MonteCarloNormalizedSequenceEntropy(),
        LexicalSimilarity("rougeL"),
    ]
    ours = {name: -np.array([row[name] for row in rows]) for name in ("sure", "known")}
    return ours | {str(estimator): estimator(stats) for estimator in theirs}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("step", choices=("ask", "compare"))
    parser.add_argument("paths", nargs="+", help="BUNDLE OUT.jsonl KNOWER ..., or OUT.jsonl")
    args = parser.parse_args()
    if args.step == "compare":
        compare(read_rows(Path(args.paths[0])))
    else:
        bundle, out, *names = args.paths
        ask(Path(bundle), Path(out), names)
    return 0


if __name__ == "__main__":
    sys.exit(main())
