"""Take the right answers to a task of code out of results of `qaflora eval`, to train on them.

    python models/recipes/solved.py ask.jsonl answers.jsonl ... -o solved.jsonl

Of each the code alone is kept, without docstrings and examples, if it still passes. An answer that
was given twice is kept once. What the answers say is run, as benchmarks/code_metric.py runs it.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qaflora_edge.evaluation.tasks import read_task

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from code_metric import programs, register
from sandbox import run_program

KEPT = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign)


def main() -> None:
    """Write a question and an answer for each that is right."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("task", type=Path, metavar="TASK")
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULTS")
    parser.add_argument("-o", dest="out", type=Path, required=True)
    args = parser.parse_args()
    register()
    task, found = read_task(args.task), dict[str, None]()
    every = []
    for path in args.results:
        with path.open(encoding="utf-8") as file:
            header, *rows = map(json.loads, file)
        if task.sha256 not in (each["sha256"] for each in header["tasks"]):
            sys.exit(f"{path} has no answers to {args.task}. Give the file that was asked.")
        every += rows
    for row in every:
        item = task.items[row["item"]]
        answer = bare(row["answer"], item) if row["score"] == 1 else None
        if answer is not None:
            found[json.dumps({"question": task.question(item), "answer": answer})] = None
    args.out.write_text("".join(f"{line}\n" for line in found), encoding="utf-8")
    print(f"{args.out}: {len(found)} answers")


def bare(answer: str, fields: Mapping[str, Any]) -> str | None:
    """The code of an answer that passes, as a block; None where less of it does not pass."""
    readings, test = programs(answer, fields)
    right = next((each for each in readings if run_program([each], test).is_passed), None)
    if right is None:  # it was right by chance
        return None
    tree = ast.parse(right)
    tree.body = [node for node in tree.body if isinstance(node, KEPT)]
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            n = ast.get_docstring(node) is not None
            node.body = node.body[n:] or [ast.Pass()]
    block = f"```python\n{ast.unparse(tree)}\n```"
    return block if run_program(*programs(block, fields)).is_passed else None


if __name__ == "__main__":
    main()
