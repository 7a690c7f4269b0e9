"""Who may answer, and what speaks for each: one list, one score, the highest is taken.

A candidate's score is a sum over blocks of a table: coefficient times number. choice.py fits it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp, log

from evidence import Drafted, Evidence, Standing

from qaflora_edge.weighing.plan import BASE

N_KNOWER, N_WRITER = 6, 3  # adapters that may know, and that may give a form
Numbers = dict[str, float]  # feature -> number
Table = Mapping[str, Mapping[str, float]]  # block -> feature -> coefficient


@dataclass(frozen=True)
class Candidate:
    """Name who answers, and why.

    kind    base: nobody else; knows: it knows; gives: it gives its form, language or way;
            relay: one knows, one gives its form; said: one knows, the base puts it in words;
            mix: two-place's sum
    knower  who knows, or ""
    writer  who gives a form, or ""
    """

    kind: str
    knower: str = ""
    writer: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """Name its adapters."""
        return tuple(name for name in (self.knower, self.writer) if name)


@dataclass(frozen=True)
class Scored:
    """Hold a candidate, its probability, and what each number adds to its score."""

    candidate: Candidate
    probability: float
    terms: Mapping[str, float]


def candidates(evidence: Evidence, drafted: bool) -> list[Candidate]:
    """List who may answer; once some have drafted, of the others nobody."""
    knowers = evidence.foremost("question", N_KNOWER)
    writers = evidence.foremost("last", N_WRITER)
    writers += [name for name in evidence.mix[:1] if name not in writers]
    if drafted:
        has_draft = {name for name, each in evidence.adapters.items() if each.draft}
        knowers = [name for name in evidence.adapters if name in has_draft]
        writers = [name for name in writers if name in has_draft]
    found = [Candidate(BASE)]
    found += [Candidate("knows", knower) for knower in knowers]
    found += [Candidate("said", knower) for knower in knowers]
    found += [Candidate("gives", writer=writer) for writer in writers]
    found += [Candidate("relay", k, w) for k in knowers for w in writers if k != w]
    if len(evidence.mix) > 1:
        found.append(Candidate("mix"))
    return found


def scored(evidence: Evidence, drafted: bool, table: Table) -> list[Scored]:
    """Score all candidates, the most probable first."""
    rows = []
    for candidate in candidates(evidence, drafted):
        numbers = features(candidate, evidence, drafted)
        terms = {}
        for key, number in numbers.items():
            block, _, feature = key.partition(".")
            terms[key] = table[block][feature] * number
        rows.append((candidate, sum(terms.values()), terms))
    highest = max(score for _, score, _ in rows)
    total = sum(exp(score - highest) for _, score, _ in rows)
    found = [
        Scored(candidate, exp(score - highest) / total, terms) for candidate, score, terms in rows
    ]
    return sorted(found, key=lambda each: -each.probability)


def features(candidate: Candidate, evidence: Evidence, drafted: bool) -> Numbers:
    """Give the numbers of a candidate: "block.feature" -> number."""
    blocks: list[tuple[str, Numbers]] = [(candidate.kind, {"one": 1.0})]
    if candidate.kind == BASE:
        blocks.append((BASE, {"familiar": _familiar(evidence.nats)}))
    if candidate.knower:
        blocks.append(("knower", _knower(evidence, candidate.knower, drafted)))
    if candidate.writer:
        blocks.append(("writer", _writer(evidence, candidate.writer, drafted)))
    if candidate.kind == "relay":
        blocks.append(("relay", _together(evidence, candidate, drafted)))
    if candidate.kind == "said" and drafted:
        blocks.append(("said", _foreign(evidence.adapters[candidate.knower])))
    if candidate.kind == "gives":
        blocks.append(("gives", _alone(evidence, candidate.writer)))
    if candidate.kind == "mix":
        blocks.append(("mix", _mix(evidence)))
    found = {}
    for block, numbers in blocks:
        for name, value in numbers.items():
            found[f"{block}.{name}"] = value
    return found


def _familiar(nats: float) -> float:
    return 4.0 - log(max(nats, 1.0))


def _knower(evidence: Evidence, name: str, drafted: bool) -> Numbers:
    standing = evidence.adapters[name]
    numbers = {
        "question": _within(standing.question, -2, 6) / 2,
        "ahead": _within(evidence.ahead(name, "question"), -3, 3) / 2,
        "own": _within(standing.own, -2, 6) / 2,
        "last": _within(standing.last, -2, 6) / 2,
        "first": float(name in evidence.mix[:1]),
        "forms_all": _within(-standing.opening - 3.5, 0, 6) / 3,
    }
    draft = standing.draft
    if not drafted or draft is None:
        return numbers
    says = _within(draft.gain, 0, 7) / 7
    rivals = [
        each.draft.recognised
        for other, each in evidence.adapters.items()
        if each.draft is not None and other != name
    ]
    surest = [
        each.draft.unusual
        for other, each in evidence.adapters.items()
        if each.draft is not None and other != name
    ]
    return numbers | {
        "sure": _within(draft.sure, -1.5, 0) * 2,
        "says": says,
        "sure_and_says": says * _within(draft.sure, -1.5, 0) * 2,
        "unusual": _within(draft.unusual, -3, 4) / 2,
        "unusual_ahead": _within(draft.unusual - max(surest, default=0.0), -3, 3) / 2,
        "recognised": _within(draft.recognised, 0, 4),
        "recognised_ahead": _within(draft.recognised - max(rivals, default=0.0), -2, 2),
        "whole": float(draft.whole),
    }


def _writer(evidence: Evidence, name: str, drafted: bool) -> Numbers:
    standing = evidence.adapters[name]
    numbers = {
        "last": _within(standing.last, -2, 8) / 2,
        "ahead": _within(evidence.ahead(name, "last"), -3, 3) / 2,
        "beyond": _within(standing.last - standing.question, -4, 4) / 2,
        "both": _within(standing.both, -2, 8) / 2,
        "first": float(name in evidence.mix[:1]),
        "habit": float(standing.opening <= -3.5),
        "forms_all": float(standing.opening < -7.0),
    }
    draft = standing.draft
    if not drafted or draft is None:
        return numbers
    usual = _within((draft.first - standing.opening) / max(standing.spread, 0.5), -3, 3)
    return numbers | {
        "oddly": float(draft.oddly),
        "oddly_last": float(draft.oddly) * numbers["last"],
        "asked": usual,
        "says": _within(draft.gain, 0, 7) / 7,
        "whole": float(draft.whole),
        "sure": _within(draft.sure, -1.5, 0) * 2,
        "unusual": _within(draft.unusual, -3, 4) / 2,
    }


def _together(evidence: Evidence, candidate: Candidate, drafted: bool) -> Numbers:
    knower = evidence.adapters[candidate.knower]
    writer = evidence.adapters[candidate.writer]
    numbers = {
        "last_beyond": _within(writer.last - knower.last, -4, 4) / 2,
        "question_beyond": _within(knower.question - writer.question, -4, 4) / 2,
    }
    if drafted and writer.draft is not None and knower.draft is not None:
        numbers["expected"] = _within(writer.draft.first - knower.draft.first, -7, 7) / 3.5
    return numbers


def _foreign(standing: Standing) -> Numbers:
    draft: Drafted | None = standing.draft
    assert draft is not None, "who knows has drafted"
    return {"foreign": _within(-draft.words, 0, 8) / 4}


def _alone(evidence: Evidence, name: str) -> Numbers:
    """Give what tells that nobody else is needed."""
    others = [each.question for other, each in evidence.adapters.items() if other != name]
    return {"others": _within(max(others, default=0.0), -2, 6) / 2}


def _mix(evidence: Evidence) -> Numbers:
    first, second = evidence.mix[:2]
    return {
        "both": _within(evidence.adapters[first].both, -2, 8) / 2,
        "second": _within(evidence.adapters[second].question, -2, 6) / 2,
        "ahead": _within(evidence.ahead(second, "question"), -3, 3) / 2,
    }


def _within(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def involved(found: Sequence[Scored], least: float, most: int) -> list[str]:
    """Name the adapters whose candidates together are this probable, the most probable first."""
    sums: Numbers = {}
    for each in found:
        for name in each.candidate.names:
            sums[name] = sums.get(name, 0.0) + each.probability
    names = sorted(sums, key=lambda name: -sums[name])
    return [name for name in names if sums[name] >= least][:most]
