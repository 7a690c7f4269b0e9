"""Record what is measured of each adapter for questions of the zoo, and whom `relay` takes.

    python benchmarks/zoo/record.py BUNDLE OUT.jsonl [--times N]

Each adapter of the bundle that recipes.toml has is asked for; the six of demo/ are there besides.
OUT gets a line for each question: what it is, who should answer, the numbers of each adapter, and
the plan of `relay`. What is there is not recorded again. fit.py reads it: no model is asked there.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import data
from data import FORMED, KNOWING, Item, Recipe

from qaflora_edge import Engine, register_strategy
from qaflora_edge.weighing import relay
from qaflora_edge.weighing.known import Heard, recognised, sureness
from qaflora_edge.weighing.plan import BASE, Plan
from qaflora_edge.weighing.strategy import Reading
from qaflora_edge.weighing.two_place import caution

N_KNOWER, N_FORM = 6, 3  # adapters that draft: the first in the question, and at the last token


@dataclass
class Recorder(relay.RelayStrategy):
    """Plan as `relay` does, and keep the numbers."""

    row: dict[str, Any] = field(default_factory=dict)
    name = "recorder"

    def plan(self, reading: Reading) -> Plan:
        plan = super().plan(reading)
        self.row = recorded(reading, plan)
        return plan


def recorded(reading: Reading, plan: Plan) -> dict[str, Any]:
    """Give the numbers of the question, and of each adapter; of those that draft, more."""
    query = reading.query
    two_place = relay.TwoPlace.plan(Recorder(), reading)
    subject = relay._subject(reading, two_place)
    at_last, own = relay._standing_out(reading)
    first = relay._heaviest(query, two_place)
    by_question = sorted(subject.scores, key=subject.scores.__getitem__, reverse=True)
    by_last = sorted(at_last, key=at_last.__getitem__, reverse=True)
    asked = [*dict.fromkeys([*by_question[:N_KNOWER], *by_last[:N_FORM], *filter(None, [first])])]
    drafts = [relay._first(draft) for draft in reading.drafts(asked, relay.N_DRAFT)]
    by_base = reading.base_logprobs(drafts)
    of_base, *expected = reading.expected([BASE, *asked], subject.goes_on)
    heard = Heard(dict(zip(asked, drafts, strict=True)), dict(zip(asked, by_base, strict=True)), {})
    adapters = {}
    for name in query.adapters:
        scores = two_place.why[name].scores
        adapters[name] = {
            "question": subject.scores[name],
            "alone": scores["question"],
            "own": own[name],
            "last": at_last[name],
            "both": scores["answer"],
            "opening": query.typical[name][relay.OPENING]["mean"],
            "opening_spread": query.typical[name][relay.OPENING]["spread"],
        }
    for name, draft, logprobs in zip(asked, drafts, expected, strict=True):
        adapters[name] |= {
            "sure": sureness(draft.logprobs, heard.by_base[name]),
            "unusual": relay._unusually_sure(query, heard, name),
            "gain": sum(draft.logprobs) - sum(heard.by_base[name]),
            "least": min(draft.logprobs, default=0.0),
            "first": heard.by_base[name][0] if heard.by_base[name] else 0.0,
            "words": relay._begins_in_words(reading, heard, name) if draft.tokens else 0.0,
            "oddly": relay._begins_oddly(query, heard, name),
            "whole": draft.is_whole,
            "recognised": recognised(logprobs, of_base),
            "text": draft.text,
        }
    return {
        "nats": subject.nats,
        "own_nats": reading.surprise(),
        "goes_on": subject.goes_on,
        "caution": caution(reading),
        "later": query.is_later,
        "adapters": adapters,
        "two_place": weighed(query.adapters, two_place),
        "relay": weighed(query.adapters, plan),
        "knower": plan.drafting.knower if plan.drafting else "",
        "sure": plan.sure,
    }


def weighed(adapters: Sequence[str], plan: Plan) -> dict[str, float]:
    means = plan.weights.mean(axis=1)  # type: ignore[union-attr]
    return {name: float(mean) for name, mean in zip(adapters, means, strict=True) if mean > 0}


def questions(loaded: Sequence[str], times: int) -> Iterator[tuple[str, str, Item]]:
    """Give set, adapters that should answer (joined by +) and item."""
    of_zoo = [recipe for name, recipe in data.recipes().items() if name in loaded]
    for knower in of_zoo:
        if knower.kind in KNOWING:
            for name, domain, items in data.knower_tasks(knower):
                n = 2 if name.startswith("facts") and not name.endswith("en") else 4
                yield from of_set(name, domain, items, n * times)
            for other in of_zoo:
                if other.kind in FORMED or speaks(knower, other):
                    pairs = list(data.paired(knower, other))
                    name = f"{knower.name}_as_{other.name}"
                    yield from of_set(name, f"{knower.name}+{other.name}", pairs, 2 * times)
    for recipe in of_zoo:
        yield from own(recipe, 3 * times)
    yield from everyday(20 * times)


def speaks(knower: Recipe, language: Recipe) -> bool:
    """Tell whether a knower's facts are asked in the language of another adapter."""
    first = next(iter(data.SUBJECTS[knower.learns]["facts"].values()))
    return {"german": "de", "french": "fr"}.get(language.learns) in first


def own(recipe: Recipe, n: int) -> Iterator[tuple[str, str, Item]]:
    """Ask what belongs to a form or a code alone."""
    if recipe.kind in FORMED:
        known = list(data.asked_as(data.known()[1], recipe.learns))
        yield from of_set(f"own_{recipe.name}", recipe.name, known, n)
        drawn = list(islice(data.sums(Random(f"{recipe.name} sums")), data.N_ITEM))
        sums = list(data.asked_as(drawn, recipe.learns))
        yield from of_set(f"sums_as_{recipe.name}", recipe.name, sums, n)
    if recipe.kind == "code":
        draw = Random(f"{recipe.name} asked")
        pairs = islice(data.CODE[recipe.learns](draw), data.N_ITEM)
        items = [{"question": asked, "answer": answer} for asked, answer in pairs]
        yield from of_set(f"own_{recipe.name}", recipe.name, items, n)


def everyday(n: int) -> Iterator[tuple[str, str, Item]]:
    for name in ("everyday", "unfit"):
        items = [{"question": text, "answer": "(base)"} for text in data.EVERYDAY[name]]
        yield from of_set(name, BASE, items, n)


def of_set(name: str, domain: str, items: list[Item], n: int) -> Iterator[tuple[str, str, Item]]:
    should = BASE if name.startswith("untaught") else domain
    for item in data.some(items, f"{name} recorded", n):
        yield name, should, item


def main() -> int:
    """Record what was not recorded."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument("out", type=Path, metavar="OUT.jsonl")
    parser.add_argument("--times", type=int, default=1, metavar="N")
    args = parser.parse_args()
    recorder = Recorder()
    register_strategy(recorder)
    done = set()
    if args.out.exists():
        rows = map(json.loads, args.out.read_text("utf-8").splitlines())
        done = {(row["set"], row["asked"]) for row in rows}
    with Engine(args.bundle, n_ctx=1024) as engine, open(args.out, "a", encoding="utf-8") as out:
        for name, should, item in questions(engine.adapters, args.times):
            messages = item.get("messages") or [{"role": "user", "content": item["question"]}]
            asked = json.dumps(messages, ensure_ascii=False)
            if (name, asked) in done:
                continue
            engine.weights(messages, strategy="recorder")
            row = {"set": name, "should": should, "asked": asked} | rounded(recorder.row)
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
            out.flush()
    return 0


def rounded(value: Any) -> Any:
    """Give a row with four digits a number."""
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    return value


if __name__ == "__main__":
    sys.exit(main())
