"""Write a task of functions to complete whose examples say whether they are right.

    pip install algorithms boltons more-itertools pydash toolz
    python models/recipes/problems.py algorithms boltons more_itertools pydash toolz -o ask.jsonl
    python benchmarks/code_metric.py eval BUNDLE ask.jsonl --temp 0.7 -o answers.jsonl
    python models/recipes/solved.py ask.jsonl answers.jsonl -o solved.jsonl
    python models/recipes/train.py code-solved --base BASE.gguf --data . -o coder

A problem is the signature and docstring of a function of the packages, which has examples (`>>>`)
that the function itself passes with nothing else defined. What is trained on is the base's own
answers that pass: a base that writes code already unlearns some of it from other people's style.
The packages are imported and their examples are run: take only ones that you trust.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import doctest
import importlib
import inspect
import io
import json
import pkgutil
import random
import signal
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HEADER = {
    "name": "problems",
    "metric": "code",
    "template": "Complete the function. Answer with Python code only.\n\n```python\n{prompt}```",
    "max_tokens": 256,
    "domain": "code",
}
PROMPT = range(80, 900)  # characters
SECONDS = 5  # for the examples of one function
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
TEST = """
import doctest

def check(candidate):
    examples = [doctest.Example(*each) for each in {examples!r}]
    known = {{**globals(), {name!r}: candidate}}
    test = doctest.DocTest(examples, known, {name!r}, None, 0, None)
    runner = doctest.DocTestRunner(optionflags={flags})
    assert not runner.run(test, out=lambda text: None).failed
"""


def main() -> None:
    """Write the task, in an order of its own."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("packages", nargs="+", metavar="PACKAGE", help="as it is imported")
    parser.add_argument("-o", dest="out", type=Path, required=True)
    args = parser.parse_args()
    items = {item["entry_point"]: item for name in args.packages for item in problems(name)}
    lines: list[Any] = [{"task": HEADER}, *random.Random(0).sample([*items.values()], len(items))]
    args.out.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    print(f"{args.out}: {len(items)} problems")


def problems(package: str) -> Iterator[dict[str, str]]:
    """The items that a package gives."""
    root = importlib.import_module(package)
    inner = pkgutil.walk_packages(root.__path__, f"{package}.", onerror=lambda name: None)
    for name in [package, *(each.name for each in inner)]:
        if name.endswith(".__main__"):
            continue
        try:
            module = importlib.import_module(name)
            source = inspect.getsource(module)
        except (Exception, SystemExit):  # it needs what is not installed
            continue
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                item = problem(node)
                if item and passes(getattr(module, node.name, None), item["test"]):
                    yield {"task_id": f"{name}.{node.name}", **item}


def problem(node: ast.FunctionDef) -> dict[str, str] | None:
    """A function without its body and types, if it has examples of itself."""
    doc = ast.get_docstring(node) or ""
    try:
        examples = doctest.DocTestParser().get_examples(doc)
    except ValueError:
        return None
    if not any(f"{node.name}(" in each.source and each.want for each in examples):
        return None
    every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    for arg in [*every, node.args.vararg, node.args.kwarg]:
        if arg is not None:
            arg.annotation = None
    node.returns, node.decorator_list = None, []
    head, text = ast.unparse(node).splitlines()[0], textwrap.indent(doc, "    ").strip()
    prompt = f'{head}\n    """{text}\n    """\n'
    if len(prompt) not in PROMPT or "\\" in doc or '"""' in doc:
        return None
    pairs = [(each.source, each.want) for each in examples]
    test = TEST.format(examples=pairs, name=node.name, flags=FLAGS)
    return {"prompt": prompt, "entry_point": node.name, "test": test}


def passes(function: Any, test: str) -> bool:
    """Whether a function passes its own examples in time, with nothing else defined."""

    def late(*_: Any) -> None:
        raise TimeoutError

    scope: dict[str, Any] = {}
    exec(test, scope)
    signal.signal(signal.SIGALRM, late)
    # Again and again: doctest takes the error for that of one example, and goes on to the next.
    signal.setitimer(signal.ITIMER_REAL, SECONDS, SECONDS)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            scope["check"](function)
    except (Exception, SystemExit):  # whatever its examples raise
        return False
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return True


if __name__ == "__main__":
    main()
