"""Bind answers to a JSON schema, with a draft in words before them and without.

    python benchmarks/bound.py demo TASKS -o RESULTS.jsonl [--n 30] [--sets facts,sums,...]

TASKS is what `models/recipes/shop.py OUT --unused` writes. `facts` are questions about the shop and
`sums` two steps of arithmetic; both answer `{"answer": integer}`. `facts as JSON` say so in words
too. `orders` are extracted by a schema with the names that `json` writes, `orders renamed` by one
with others. `inbox` chooses one of four departments (models/recipes/inbox.toml).

Each is asked of the base, of the adapter for it and of the bundle's own strategy, greedily, first
bound at once, then with a draft. RESULTS.jsonl has a line for each answer; a second run goes on.
"""

import argparse
import importlib
import json
import random
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from qaflora_edge import Engine, Generation
from qaflora_edge.evaluation.table import difference

SEED = 56
N_TOKEN = 96
ALONE = {
    "facts": "company",
    "sums": "math",
    "facts as JSON": "company",
    "orders": "json",
    "orders renamed": "json",
}
SETS = (*ALONE, "inbox")
WHO = ("base", "alone", "own")  # the adapter of a set alone, the bundle's own strategy
# Two steps each: a and b are multiplied, c is added or taken away.
SUMS = (
    ("A baker fills {a} trays with {b} rolls each and sells {c}. How many rolls are left?", -1),
    ("Ana buys {a} boxes of {b} pencils and finds {c} more. How many pencils has she?", 1),
    ("A bus makes {a} trips with {b} people each; {c} of them are children. How many are not?", -1),
    ("Tom earns {b} euros an hour, works {a} hours and spends {c}. How many euros has he?", -1),
    ("In {a} rows stand {b} chairs each. {c} more are brought. How many chairs are there?", 1),
)
ORDER = {"name": "string", "item": "string", "quantity": "integer", "phone": "string"}
RENAMED = {"name": "customer", "item": "article", "quantity": "count", "phone": "telephone"}


@dataclass(frozen=True)
class Question:
    """One question with its schema and its answer."""

    set: str
    text: str
    schema: Mapping[str, Any]
    answer: Any


@dataclass(frozen=True)
class Result:
    """One answer.

    n_token  of the answer alone; n_draft those of drafts before it
    """

    set: str
    text: str
    strategy: str
    is_drafting: bool
    answer: str
    draft: str
    is_right: bool
    n_token: int
    n_draft: int


def main() -> None:
    """Ask what was not asked yet, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", metavar="BUNDLE")
    parser.add_argument("tasks", type=Path, metavar="TASKS")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="RESULTS.jsonl")
    parser.add_argument("--n", type=int, default=30, metavar="N", help="questions of a set")
    parser.add_argument("--sets", default=",".join(SETS), metavar="S,...")
    parser.add_argument("--who", default=",".join(WHO), metavar="W,...")
    parser.add_argument("--parallel", type=int, default=8, metavar="N")
    parser.add_argument("--threads", type=int, metavar="N")
    args = parser.parse_args()
    results = []
    if args.output.exists():
        lines = args.output.read_text(encoding="utf-8").splitlines()
        results = [Result(**json.loads(line)) for line in lines]
    done = {(result.set, result.text, result.strategy, result.is_drafting) for result in results}
    with (
        Engine(args.bundle, threads=args.threads, n_parallel=args.parallel, n_ctx=1024) as engine,
        args.output.open("a", encoding="utf-8") as output,
    ):
        asked = []
        for question in questions(args.tasks, args.sets.split(","), args.n):
            for strategy in strategies_for(question.set, engine.strategy, args.who.split(",")):
                for is_drafting in (False, True):
                    if (question.set, question.text, strategy, is_drafting) not in done:
                        asked.append((question, strategy, is_drafting))
        requests = [request(engine, *one) for one in asked]
        for index, answer in engine.generate_many(requests):
            result = result_of(answer, *asked[index])
            results.append(result)
            output.write(json.dumps(asdict(result), ensure_ascii=False) + "\n")
            output.flush()
    print_table(results)


def strategies_for(name: str, own: str, who: Collection[str]) -> list[str]:
    """Name who answers the questions of a set."""
    alone = ALONE.get(name)
    strategies = {"base": "base", "alone": f"single:{alone}", "own": own}
    return [strategies[each] for each in who if alone or each != "alone"]


def questions(tasks: Path, names: Sequence[str], n: int) -> Iterator[Question]:
    """Give n questions of each set, in turn."""
    by_set = []
    for name in names:
        found = list(of_set(tasks, name))
        random.Random(SEED).shuffle(found)
        by_set.append(found[:n])
    for of_all in zip_longest(*by_set):
        yield from filter(None, of_all)


def of_set(tasks: Path, name: str) -> Iterator[Question]:
    """Give all questions of a set."""
    whole = {"answer": "integer"}
    if name == "sums":
        rng = random.Random(SEED)
        for text, sign in SUMS * 6:
            a, b = rng.randrange(3, 10), rng.randrange(4, 10)
            c = rng.randrange(2, a * b)
            question = text.format(a=a, b=b, c=c)
            yield Question(name, question, object_of(whole), {"answer": a * b + sign * c})
    elif name == "inbox":
        for each in importlib.import_module("decisions").inbox():
            schema = object_of({"department": "string"})
            schema["properties"]["department"] = {"enum": list(each.choices)}
            listed = "\n".join(f"{choice}: {means}" for choice, means in each.choices.items())
            text = f"{each.text}\n\n{listed}"
            yield Question(name, text, schema, {"department": each.answer})
    else:
        file = {"facts": "company_en", "facts as JSON": "company_json_en"}.get(name, "json_en")
        for line in (tasks / f"{file}.jsonl").read_text(encoding="utf-8").splitlines()[1:]:
            item = json.loads(line)
            answer = item["answer"]
            if name == "facts":
                yield Question(name, item["question"], object_of(whole), {"answer": answer})
            elif name == "facts as JSON":
                yield Question(name, item["question"], object_of(whole), answer[0])
            elif name == "orders":
                yield Question(name, item["question"], object_of(ORDER), answer)
            else:
                fields = {RENAMED[key]: kind for key, kind in ORDER.items()}
                named = {RENAMED[key]: value for key, value in answer.items()}
                yield Question(name, item["question"], object_of(fields), named)


def object_of(fields: Mapping[str, str]) -> dict[str, Any]:
    """Write the schema of an object with these fields and no others."""
    properties: dict[str, Any] = {name: {"type": kind} for name, kind in fields.items()}
    return {
        "type": "object",
        "properties": properties,
        "required": [*fields],
        "additionalProperties": False,
    }


def request(engine: Engine, question: Question, strategy: str, is_drafting: bool) -> dict[str, Any]:
    """Ask one question, with a draft or at once."""
    return {
        "prompt": engine.chat_tokens([{"role": "user", "content": question.text}]),
        "strategy": strategy,
        "json_schema": question.schema,
        "max_tokens": N_TOKEN,
        "draft": is_drafting,
    }


def result_of(answer: Generation, question: Question, strategy: str, is_drafting: bool) -> Result:
    """Check an answer."""
    text = answer.text()
    try:
        is_right = json.loads(text) == question.answer
    except ValueError:  # cut
        is_right = False
    return Result(
        set=question.set,
        text=question.text,
        strategy=strategy,
        is_drafting=is_drafting,
        answer=text,
        draft="" if answer.draft is None else answer.draft.text,
        is_right=is_right,
        n_token=answer.n_completion,
        n_draft=answer.n_draft,
    )


def print_table(results: Sequence[Result]) -> None:
    """Print right answers with both, the difference with its 95 % interval, and the cost."""
    groups: dict[tuple[str, str], dict[bool, list[Result]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        groups[result.set, result.strategy][result.is_drafting].append(result)
    print("| | who answers | at once | with a draft | points (95 %) | drafts | tokens |")
    print("|---|---|--:|--:|--:|--:|--:|")
    for (name, strategy), ways in groups.items():
        at_once = {result.text: result for result in ways[False]}
        drafted = {result.text: result for result in ways[True]}
        texts = [text for text in at_once if text in drafted]
        if not texts:
            continue
        gains = [drafted[text].is_right - at_once[text].is_right for text in texts]
        gain = difference([np.array(gains, float)], is_right=True)
        n_before = sum(at_once[text].is_right for text in texts)
        n_after = sum(drafted[text].is_right for text in texts)
        drafts = [drafted[text].n_draft for text in texts if drafted[text].n_draft]
        length = f"{median(drafts):.0f}" if drafts else "-"
        points = [f"{100 * part:+.0f}" for part in (gain.value, gain.low, gain.high)]
        print(
            f"| {name} | {strategy} | {n_before} of {len(texts)} | {n_after} "
            f"| {points[0]} ({points[1]} to {points[2]}) | {len(drafts)} | {length} |"
        )


if __name__ == "__main__":
    main()
