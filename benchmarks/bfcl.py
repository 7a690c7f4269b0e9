"""Ask a base for calls of tools, freely and bound to their grammar: questions of bfcl-eval.

    python benchmarks/bfcl.py BUNDLE -o RESULTS.jsonl [--strategies base,static] [--every 4]

`bfcl-eval` (`pip install --no-deps bfcl-eval`) brings questions, answers and the check of a call.
Each strategy answers every fourth question with one tool, and with several to choose from, twice:
`auto` leaves the answer free, `required` binds it to a call. A call is right where the tool and
every argument are. RESULTS.jsonl has a line for each answer; a second run goes on from there.
"""

import argparse
import importlib
import json
import sys
from collections import defaultdict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from qaflora_edge import Engine
from qaflora_edge.weighing.plan import FusionWeights

CATEGORIES = {"simple_python": "one tool", "multiple": "several tools"}
TOOL_CHOICES = ("auto", "required")
MAX_TOKENS = 256
MODEL = "qaflora"  # the checker looks up whether a model writes `_` for `.`


@dataclass(frozen=True)
class Question:
    """One question, its tools as OpenAI takes them, and what the checker needs."""

    id: str
    category: str
    messages: list[dict[str, str]]
    tools: list[dict[str, Any]]
    functions: list[dict[str, Any]]
    answers: list[dict[str, Any]]


@dataclass(frozen=True)
class Result:
    """How one question was answered under one strategy."""

    id: str
    category: str
    strategy: str
    tool_choice: str
    n_call: int
    is_right: bool
    error: str
    adapters: list[str]  # that the strategy took


def checker_module() -> ModuleType:
    """Import the check of calls, without the clients of all the models that it knows."""
    config = ModuleType("bfcl_eval.constants.model_config")
    names = {MODEL: SimpleNamespace(underscore_to_dot=True)}
    config.MODEL_CONFIG_MAPPING = names  # type: ignore[attr-defined]
    sys.modules[config.__name__] = config
    return importlib.import_module("bfcl_eval.eval_checker.ast_eval.ast_checker")


def read_questions(every: int) -> list[Question]:
    """Read every so-manieth question of both categories."""
    package = importlib.import_module("bfcl_eval")
    assert package.__file__ is not None
    data = Path(package.__file__).parent / "data"
    questions = []
    for category in CATEGORIES:
        name = f"BFCL_v4_{category}.json"
        answers = {}
        for line in read_lines(data / "possible_answer" / name):
            answers[line["id"]] = line["ground_truth"]
        for line in read_lines(data / name)[::every]:
            tools = [tool_of(function) for function in line["function"]]
            question = Question(
                id=line["id"],
                category=category,
                messages=line["question"][0],
                tools=tools,
                functions=line["function"],
                answers=answers[line["id"]],
            )
            questions.append(question)
    return sorted(questions, key=lambda question: int(question.id.rpartition("_")[2]))


def read_lines(path: Path) -> list[Any]:
    """Read a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def tool_of(function: Mapping[str, Any]) -> dict[str, Any]:
    """Write a function as a tool, as the benchmark does for OpenAI."""
    types = importlib.import_module("bfcl_eval.constants.type_mappings").GORILLA_TO_OPENAPI
    parameters = as_json_schema(function["parameters"], types)
    name = function["name"].replace(".", "_")
    about = {"name": name, "description": function["description"], "parameters": parameters}
    return {"type": "function", "function": about}


def as_json_schema(schema: Mapping[str, Any], types: Mapping[str, str]) -> dict[str, Any]:
    """Name the types of a schema as JSON Schema does."""
    changed = {**schema, "type": types.get(schema.get("type", "string"), "string")}
    if "properties" in schema:
        properties = schema["properties"].items()
        changed["properties"] = {name: as_json_schema(value, types) for name, value in properties}
    if "items" in schema:
        changed["items"] = as_json_schema(schema["items"], types)
    return changed


def ask(engine: Engine, checker: ModuleType, question: Question, how: tuple[str, str]) -> Result:
    """Ask one question under a strategy and a choice of tools, and check the calls."""
    strategy, tool_choice = how
    mixes: list[FusionWeights] = []
    answer = engine.chat(
        question.messages,
        tools=question.tools,
        tool_choice=tool_choice,
        weights=strategy,
        temperature=0,
        max_tokens=MAX_TOKENS,
        on_weights=mixes.append,
    )
    calls = answer["choices"][0]["message"].get("tool_calls") or []
    error = check(checker, question, calls)
    return Result(
        id=question.id,
        category=question.category,
        strategy=strategy,
        tool_choice=tool_choice,
        n_call=len(calls),
        is_right=not error,
        error=error,
        adapters=[name for name, mean in mixes[0].means.items() if mean],
    )


def check(checker: ModuleType, question: Question, calls: list[Any]) -> str:
    """Say what is wrong with the calls; "" where nothing is."""
    if not calls:
        return "no call"
    functions = [call["function"] for call in calls]
    try:
        outputs = [{call["name"]: json.loads(call["arguments"])} for call in functions]
    except ValueError:
        return "arguments that are no JSON"
    language = importlib.import_module("bfcl_eval.constants.enums").Language.PYTHON
    verdict = checker.ast_checker(
        question.functions, outputs, question.answers, language, question.category, MODEL
    )
    return "" if verdict["valid"] else str(verdict.get("error_type") or verdict["error"])


def read_results(path: Path) -> list[Result]:
    """Read the answers of earlier runs."""
    return [Result(**line) for line in read_lines(path)] if path.exists() else []


def print_table(results: list[Result]) -> None:
    """Print right answers by strategy, category and choice of tools."""
    cells = defaultdict(list)
    for result in results:
        cells[result.strategy, result.category, result.tool_choice].append(result.is_right)
    print("| strategy | | free | bound |")
    print("|---|---|--:|--:|")
    for strategy in dict.fromkeys(result.strategy for result in results):
        for category, title in CATEGORIES.items():
            row = [cells[strategy, category, choice] for choice in TOOL_CHOICES]
            counts = [f"{sum(cell)} of {len(cell)}" for cell in row]
            print(f"| {strategy} | {title} | {' | '.join(counts)} |")


def main() -> None:
    """Ask what was not asked yet, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", metavar="BUNDLE")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="RESULTS.jsonl")
    parser.add_argument("--strategies", default="base,static", metavar="S,...")
    parser.add_argument("--every", type=int, default=4, metavar="N")
    parser.add_argument("--parallel", type=int, default=4, metavar="N")
    parser.add_argument("--threads", type=int, metavar="N")
    args = parser.parse_args()
    checker = checker_module()
    questions = read_questions(args.every)
    results = read_results(args.output)
    done = {(result.id, result.strategy, result.tool_choice) for result in results}
    n_ctx = 4096
    with (
        Engine(args.bundle, n_ctx=n_ctx, n_parallel=args.parallel, threads=args.threads) as engine,
        args.output.open("a", encoding="utf-8") as output,
        ThreadPoolExecutor(args.parallel) as threads,
    ):
        left = []
        for question in questions:  # all ways of one question, so that a part can be compared
            for strategy in args.strategies.split(","):
                for choice in TOOL_CHOICES:
                    if (question.id, strategy, choice) not in done:
                        left.append((question, (strategy, choice)))
        for result in threads.map(lambda one: ask(engine, checker, *one), left):
            results.append(result)
            output.write(json.dumps(asdict(result)) + "\n")
            output.flush()
    print_table(results)


if __name__ == "__main__":
    main()
