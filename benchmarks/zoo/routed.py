"""Ask which adapter answers each of Adaptive Minds' routing questions, by choice alone.

    python benchmarks/zoo/routed.py BUNDLE routing_gold.jsonl OUT.jsonl

routing_gold.jsonl is evals/gold of github.com/qpiai/adaptive-minds (Apache-2.0): a query and the
domain that should answer it. The bundle has an adapter `domain-NAME` for each, of recipes.toml.
Queries whose id begins with `route_base` fit no domain, though the file names one for a router
that must choose: there the base should answer. Who answers is the heaviest adapter of the last
step; where the base writes, who drafted for it. OUT gets a line for each query and strategy.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qaflora_edge import Engine, FusionWeights
from qaflora_edge.ask import Chat

BASE, NO_DOMAIN, PREFIX = "base", "route_base", "domain-"
STRATEGIES = ("two-place", "relay")
Row = dict[str, Any]


def main() -> int:
    """Ask all, and print how many each domain has right."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument("gold", type=Path, metavar="routing_gold.jsonl")
    parser.add_argument("out", type=Path, metavar="OUT.jsonl")
    args = parser.parse_args()
    lines = args.gold.read_text(encoding="utf-8").splitlines()
    queries = [json.loads(line) for line in lines]
    rows = []
    with (
        Engine(args.bundle, n_ctx=1024) as engine,
        open(args.out, "w", encoding="utf-8") as out,
    ):
        for row in routed(engine, queries):
            rows.append(row)
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
    for strategy in STRATEGIES:
        print_table(strategy, [row for row in rows if row["strategy"] == strategy])
    return 0


def routed(engine: Engine, queries: list[Row]) -> Iterator[Row]:
    """Choose for each query under each strategy."""
    for query in queries:
        fits_none = query["id"].startswith(NO_DOMAIN)
        wanted = BASE if fits_none else PREFIX + query["expected_adapter"]
        for strategy in STRATEGIES:
            messages = [{"role": "user", "content": query["query"]}]
            fusion = engine.generate(Chat(messages), strategy=strategy, max_tokens=1).fusion
            yield {
                "id": query["id"],
                "strategy": strategy,
                "wanted": wanted,
                "who": who_answers(fusion),
                "writer": fusion.writer,
                "because": fusion.because,
                "why": {name: dict(reason.scores) for name, reason in fusion.why.items()},
            }


def who_answers(fusion: FusionWeights) -> str:
    """Name the heaviest adapter; where the base writes, who drafted for it."""
    drafting = fusion.plan.drafting
    if fusion.writer == BASE and drafting is not None:
        return drafting.knower
    return fusion.writer


def print_table(strategy: str, rows: list[Row]) -> None:
    """Print a line for each domain, and for all that fit one."""
    asked = Counter(row["wanted"] for row in rows)
    right = Counter(row["wanted"] for row in rows if row["who"] == row["wanted"])
    for wanted, n in asked.items():
        others = Counter(row["who"] for row in rows if row["wanted"] == wanted != row["who"])
        print(f"{strategy} {wanted}: {right[wanted]} of {n}; others {dict(others)}")
    n_fit = asked.total() - asked[BASE]
    n_right = right.total() - right[BASE]
    print(f"{strategy}: {n_right} of {n_fit} that fit a domain, {n_right / n_fit:.1%}")


if __name__ == "__main__":
    sys.exit(main())
