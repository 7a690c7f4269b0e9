"""Fit one score for who answers to what record.py measured, and compare it with `relay`'s rule.

    python benchmarks/zoo/choice.py

benchmarks/results/zoo/recorded.jsonl.gz has a line for each question. A softmax over the list of
candidates.py is fitted twice: without drafts, and with those of adapters that may be taken. Each
adapter is left out once with all its questions, and half of the everyday ones: figures are of what
the fit did not see. `relay` stays the package's rule until a list has earned its place there.
"""

import gzip
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from candidates import Candidate, Table, candidates, features, involved, scored
from evidence import Drafted, Evidence, Standing
from numpy.typing import NDArray

RECORDED = Path(__file__).parents[1] / "results" / "zoo" / "recorded.jsonl.gz"
LANGUAGES = {"french", "german"}
RIDGE = 0.02  # for each question
LEAST, MOST = 0.05, 5  # probability from which an adapter drafts, and how many may
SURE = 0.9  # probability of a candidate from which nobody drafts
Row = dict[str, Any]
F64 = NDArray[np.float64]
Question = tuple[Evidence, Sequence[Candidate], NDArray[np.bool_]]


@dataclass(frozen=True)
class Recorded:
    """A line of the recording: without drafts, and all drafts that were made."""

    row: Row
    evidence: Evidence
    drafts: dict[str, Drafted]

    @property
    def parts(self) -> list[str]:
        parts: list[str] = self.row["should"].split("+")
        return parts

    def right(self, candidate: Candidate) -> bool:
        """Tell whether a candidate, with its reason, is one that should answer."""
        name = self.row["set"]
        first, *others = self.parts
        if first == "base":
            return candidate.kind == "base"
        if others:
            said = Candidate("said", first)
            may_say = others[0] in LANGUAGES and candidate == said
            return may_say or candidate == Candidate("relay", first, others[0])
        if name.startswith(("own_", "sums_as")):
            by_relay = Candidate("relay", "math", first)
            gives = Candidate("gives", writer=first)
            return candidate == gives or (name.startswith("sums") and candidate == by_relay)
        is_foreign = name.startswith("facts") and not name.endswith("_en")
        may_say = is_foreign and candidate == Candidate("said", first)
        return may_say or candidate == Candidate("knows", first)

    def wins(self, candidate: Candidate) -> bool:
        """Tell the same whatever the reason: one that knows answers as one that gives a form."""
        if candidate.kind == "mix":  # a second adapter spoils a fact, and seldom a form
            is_form = self.row["set"].startswith(("own_", "sums_as"))
            return is_form and candidate.writer == self.parts[0]
        other = candidate
        if candidate.kind == "knows":
            other = Candidate("gives", writer=candidate.knower)
        if candidate.kind == "gives":
            other = Candidate("knows", candidate.writer)
        return self.right(candidate) or self.right(other)

    def of_relay(self) -> Candidate:
        """Give whom `relay` took."""
        weights = self.row["relay"]
        chosen = sorted(weights, key=weights.__getitem__, reverse=True)
        if self.row["knower"]:
            writer = Candidate("relay", self.row["knower"], chosen[0]) if chosen else None
            return writer or Candidate("said", self.row["knower"])
        if not chosen:
            return Candidate("base")
        if len(chosen) == 1:
            return Candidate("knows", chosen[0])
        return Candidate("mix", writer=chosen[0])

    def folds(self, number: int) -> list[str]:
        """Name the folds that leave this question out."""
        if self.row["set"].startswith("untaught"):
            return [self.row["set"].partition("_")[2]]
        return [f"base{number % 2}"] if self.parts == ["base"] else self.parts


def main() -> None:
    """Print how many are right by the list and by `relay`, each adapter left out once."""
    lines = gzip.decompress(RECORDED.read_bytes()).decode().splitlines()
    everything = [recorded(json.loads(line)) for line in lines]
    folds = {fold for i, each in enumerate(everything) for fold in each.folds(i)}
    counts: dict[str, list[float]] = defaultdict(lambda: [0, 0, 0, 0])
    for fold in sorted(folds):
        train = [each for i, each in enumerate(everything) if fold not in each.folds(i)]
        early, late = fitted(train)
        for i, each in enumerate(everything):
            if fold in each.folds(i):
                taken, n_draft = choose(each, early, late)
                of_set = counts[family(each.row["set"])]
                of_set[0] += 1
                if taken.kind == "mix":
                    taken = Candidate("mix", writer=each.evidence.mix[0])
                of_set[1] += each.wins(taken)
                of_set[2] += each.wins(each.of_relay())
                of_set[3] += n_draft
    for name, (n, by_list, by_relay, n_draft) in sorted(counts.items()):
        drafts = n_draft / n
        print(f"{name}: of {n:.0f} list {by_list:.0f}, relay {by_relay:.0f}; {drafts:.1f} drafts")


def recorded(row: Row) -> Recorded:
    adapters = {}
    drafts = {}
    places = ("question", "own", "last", "both", "opening")
    told = ("sure", "unusual", "gain", "first", "words", "oddly", "whole", "recognised")
    for name, numbers in row["adapters"].items():
        of_place = {place: numbers[place] for place in places}
        adapters[name] = Standing(**of_place, spread=numbers["opening_spread"])
        if "sure" in numbers:
            drafts[name] = Drafted(**{key: numbers[key] for key in told})
    mix = sorted(row["two_place"], key=row["two_place"].__getitem__, reverse=True)
    return Recorded(row, Evidence(row["nats"], adapters, mix), drafts)


def choose(each: Recorded, early: Table, late: Table) -> tuple[Candidate, int]:
    """Give who is taken, and how many draft for it."""
    found = scored(each.evidence, False, early)
    names = [name for name in involved(found, LEAST, MOST) if name in each.drafts]
    if found[0].probability >= SURE or not names:
        return found[0].candidate, 0
    drafted = each.evidence.with_drafts({name: each.drafts[name] for name in names})
    return scored(drafted, True, late)[0].candidate, len(names)


def fitted(train: Sequence[Recorded]) -> tuple[Table, Table]:
    """Fit the table without drafts, then that with drafts of whom the first lets draft."""
    early = fit([question_of(each, each.evidence, False) for each in train], False)
    questions = []
    for each in train:
        names = [*involved(scored(each.evidence, False, early), LEAST, MOST), *each.parts]
        drafts = {name: each.drafts[name] for name in names if name in each.drafts}
        if drafts:
            questions.append(question_of(each, each.evidence.with_drafts(drafts), True))
    return early, fit(questions, True)


def question_of(each: Recorded, evidence: Evidence, drafted: bool) -> Question:
    found = candidates(evidence, drafted)
    return evidence, found, np.array([each.right(candidate) for candidate in found])


def fit(questions: Sequence[Question], drafted: bool) -> Table:
    """Fit a softmax over candidates, of which several may be right, by Newton's method."""
    keys: dict[str, int] = {}
    numbers = []
    for evidence, found, right in questions:
        of_question = [features(candidate, evidence, drafted) for candidate in found]
        for of_candidate in of_question:
            for key in of_candidate:
                keys.setdefault(key, len(keys))
        if right.any():
            numbers.append((of_question, right))
    rows = []
    for of_question, right in numbers:
        values = np.zeros((len(of_question), len(keys)))
        for row, of_candidate in zip(values, of_question, strict=True):
            for key, value in of_candidate.items():
                row[keys[key]] = value
        rows.append((values, right))
    weights = newton(rows, len(keys))
    table: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for key, at in keys.items():
        block, _, feature = key.partition(".")
        table[block][feature] = float(weights[at])
    return table


def newton(rows: Sequence[tuple[F64, NDArray[np.bool_]]], n: int) -> F64:
    ridge = RIDGE * len(rows)
    weights = np.zeros(n)
    lowest = loss(rows, weights, ridge)
    for _ in range(40):
        gradient = ridge * weights
        curvature = ridge * np.eye(n)
        for values, right in rows:
            p = softmax(values @ weights)
            of_right = p * right / (p * right).sum()
            mean = p @ values
            gradient -= (of_right - p) @ values
            curvature += (values * p[:, None]).T @ values - np.outer(mean, mean)
        step = np.linalg.solve(curvature, gradient)
        share = 1.0
        while share > 1e-4 and loss(rows, weights - share * step, ridge) > lowest:
            share /= 2
        found = loss(rows, weights - share * step, ridge)
        if lowest - found < 1e-4:
            break
        weights = weights - share * step
        lowest = found
    return weights


def loss(rows: Sequence[tuple[F64, NDArray[np.bool_]]], weights: F64, ridge: float) -> float:
    total = ridge / 2 * float(weights @ weights)
    for values, right in rows:
        total -= float(np.log(softmax(values @ weights)[right].sum()))
    return total


def softmax(scores: F64) -> F64:
    exps = np.exp(scores - scores.max())
    return np.asarray(exps / exps.sum())


def family(name: str) -> str:
    if name.startswith("facts"):
        return "facts as taught" if name.endswith("_en") else "facts in others"
    if "_as_" in name and not name.startswith("sums"):
        return "as a language" if name.endswith(tuple(LANGUAGES)) else "as a form"
    return name.partition("_")[0]


if __name__ == "__main__":
    main()
