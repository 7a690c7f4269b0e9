"""Ask the zoo's tasks of a bundle: by hand, under `two-place` and under `relay`.

    python benchmarks/zoo/ask.py BUNDLE OUT.jsonl TASK.jsonl ... [--limit N]

By hand the adapter that a task names answers, or drafts for the second that it names. A task whose
adapters are not all loaded is left out. OUT gets a line for each answer, and what is there is not
asked again. Prints how many are right a task, and AUROC and calibration error of `fusion.sure`:
facts that an adapter was taught against those that it was not.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import score
from fit import auroc, calibration_error

from qaflora_edge import Engine
from qaflora_edge.evaluation.tasks import Task, read_task

BY_HAND, STRATEGIES = "by hand", ("by hand", "two-place", "relay")
N_PARALLEL = 4
Row = dict[str, Any]


@dataclass(frozen=True)
class Asked:
    """An item of a task, and the strategy that answers it."""

    task: Task
    item: int
    strategy: str

    @property
    def key(self) -> tuple[str, int, str]:
        return self.task.name, self.item, self.strategy

    def request(self) -> Row:
        """Give the options of Engine.generate."""
        prompt = self.task.asked(self.task.items[self.item])
        strategy = self.strategy
        if strategy == BY_HAND:
            strategy = by_hand(self.task.domain or "base")
        return {"messages": prompt.messages, "strategy": strategy, "max_tokens": 64}


def by_hand(domain: str) -> str:
    """Name the strategy that lets the adapters of a domain answer."""
    first, _, second = domain.partition("+")
    if second:
        return f"relay:knower={first},writer={second}"
    return "base" if first == "base" else f"single:{first}"


def main() -> int:
    """Ask what was not asked, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument("out", type=Path, metavar="OUT.jsonl")
    parser.add_argument("tasks", type=Path, nargs="+", metavar="TASK.jsonl")
    parser.add_argument("--limit", type=int, default=20, metavar="N")
    args = parser.parse_args()
    score.register()
    rows = read_rows(args.out)
    done = {(row["task"], row["item"], row["strategy"]) for row in rows}
    tasks = [read_task(path) for path in args.tasks]
    with (
        Engine(args.bundle, n_ctx=1024, n_parallel=N_PARALLEL) as engine,
        open(args.out, "a", encoding="utf-8") as out,
    ):
        loaded = {"base", *engine.adapters}
        wanted = [task for task in tasks if loaded.issuperset((task.domain or "base").split("+"))]
        for task in wanted:
            asked = [each for each in of_task(task, args.limit) if each.key not in done]
            for row in answered(engine, asked):
                rows.append(row)
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
                out.flush()
            print_task(task.name, [row for row in rows if row["task"] == task.name])
    print_sure([row for row in rows if row["strategy"] == "relay"])
    return 0


def read_rows(path: Path) -> list[Row]:
    """Give the lines that a run before this one wrote."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def of_task(task: Task, limit: int) -> Iterator[Asked]:
    """Give each item under each strategy; by hand, a question for the base is not asked."""
    for item in range(min(limit, len(task.items))):
        for strategy in STRATEGIES:
            if strategy != BY_HAND or task.domain != "base":
                yield Asked(task, item, strategy)


def answered(engine: Engine, asked: list[Asked]) -> Iterator[Row]:
    """Answer, several together: that changes no bit of an answer."""
    requests = [each.request() for each in asked]
    for index, generation in engine.generate_many(requests):
        text = generation.text()
        each = asked[index]
        plan = generation.fusion.plan
        drafting = plan.drafting
        item = each.task.items[each.item]
        yield {
            "task": each.task.name,
            "domain": each.task.domain,
            "item": each.item,
            "strategy": each.strategy,
            "asked": each.task.question(item)[-200:],
            "wanted": item["answer"],
            "text": text,
            "score": score.score(text, item)["score"],
            "knower": drafting.knower if drafting else "",
            "writer": generation.fusion.writer,
            "known": {name: round(known, 3) for name, known in plan.known.items()},
            "sure": plan.sure,
            "because": plan.because,
        }


def print_task(name: str, rows: list[Row]) -> None:
    """Print how many are right under each strategy, or are left to the base."""
    told = []
    for strategy in STRATEGIES:
        of_strategy = [row for row in rows if row["strategy"] == strategy]
        n_right = sum(is_good(row) for row in of_strategy)
        if of_strategy:
            told.append(f"{strategy} {n_right} of {len(of_strategy)}")
    print(f"{name}: {', '.join(told)}", flush=True)


def is_good(row: Row) -> bool:
    """Tell whether an answer is right; where a base's is wanted, whether that answers alone."""
    if row["wanted"] in ("(base)", "(untaught)"):
        return row["writer"] == "base" and row["knower"] in ("", "base")
    return bool(row["score"])


def print_sure(rows: Sequence[Row]) -> None:
    """Print how well what is known tells taught facts from others, and `sure` right answers."""
    asked = [row for row in rows if row["task"].startswith(("facts_", "untaught_"))]
    knowers = {row["domain"] for row in asked}
    if not any(row["task"].startswith("untaught_") for row in asked):
        return
    known = np.array([row["known"].get(row["domain"], 0.0) for row in asked])
    is_taught = np.array([row["task"].startswith("facts_") for row in asked])
    # Whether an answer is right is not known where the base's is wanted.
    told = [row for row in rows if row["sure"] is not None and row["wanted"] != "(base)"]
    sure = np.array([row["sure"] for row in told])
    is_right = np.array([bool(row["score"]) for row in told])
    print(
        f"{len(asked)} facts of {len(knowers)} knowers, {is_taught.sum()} taught: AUROC "
        f"{auroc(known, is_taught):.3f}. {len(told)} answers have `sure`, {is_right.sum()} are "
        f"right: AUROC {auroc(sure, is_right):.3f}, "
        f"calibration error {calibration_error(sure, is_right):.3f}"
    )


if __name__ == "__main__":
    sys.exit(main())
