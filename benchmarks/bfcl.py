"""Ask a base for calls of tools, freely and bound to their grammar: questions of bfcl-eval.

    python benchmarks/bfcl.py BUNDLE -o RESULTS.jsonl [--strategies base,static] [--every 4]
        [--choices auto,required,drafted]

`bfcl-eval` (`pip install --no-deps bfcl-eval mpmath`) brings questions, answers and the checks.
Each strategy answers every fourth question with one tool, and with several to choose from, thrice:
`auto` leaves the answer free, `required` binds it to a call at once, `drafted` lets whoever answers
draft in words before. A call is right where the tool and every argument are. Where nothing is to be
called (irrelevance, every 8th; live, every 32nd), the answer is free, and right without a call.

Conversations of several turns (every 24th) go on until an answer calls nothing, for 8 steps a turn
at most; `required` binds the first answer of each turn. They are right where the checker says so.
Answers behind a tool's result are counted: texts, and those that only repeat calls of their turn.
RESULTS.jsonl has a line for each answer or conversation; a second run goes on from there.
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

from qaflora_edge import Engine, FusionWeights
from qaflora_edge.errors import ContextError

CATEGORIES = {"simple_python": "one tool", "multiple": "several tools"}
NOTHING = {"irrelevance": "nothing to call", "live_irrelevance": "nothing to call, live"}
TURNS = "multi_turn_base"
SPARSE = {"irrelevance": 2, "live_irrelevance": 8, TURNS: 6}  # times --every
TOOL_CHOICES = ("auto", "required")
DRAFTED = "drafted"
WAYS = (*TOOL_CHOICES, DRAFTED)
MAX_TOKENS = 256
MAX_STEPS = 8  # answers of one turn
N_CTX = {TURNS: 12288}  # tokens; 4096 else
MODEL = "qaflora"  # the checker looks up whether a model writes `_` for `.`


@dataclass(frozen=True)
class Question:
    """One question, its tools as OpenAI takes them, and what the checker needs."""

    id: str
    category: str
    turns: list[list[dict[str, Any]]]
    tools: list[dict[str, Any]]
    functions: list[dict[str, Any]]
    answers: list[Any]
    entry: dict[str, Any]


@dataclass(frozen=True)
class Result:
    """How one question was answered under one strategy.

    n_after, n_text, n_repeat  answers behind a tool's result: all, texts, and those that repeat
    """

    id: str
    category: str
    strategy: str
    tool_choice: str
    n_call: int
    is_right: bool
    error: str
    adapters: list[str]  # that the strategy took
    n_after: int = 0
    n_text: int = 0
    n_repeat: int = 0


def checker_module() -> ModuleType:
    """Import the check of calls, without the clients of all the models that it knows."""
    config = ModuleType("bfcl_eval.constants.model_config")
    names = {MODEL: SimpleNamespace(underscore_to_dot=True)}
    config.MODEL_CONFIG_MAPPING = names  # type: ignore[attr-defined]
    sys.modules[config.__name__] = config
    return importlib.import_module("bfcl_eval.eval_checker.ast_eval.ast_checker")


def read_questions(category: str, every: int) -> list[Question]:
    """Read every so-manieth question of a category."""
    package = importlib.import_module("bfcl_eval")
    assert package.__file__ is not None
    data = Path(package.__file__).parent / "data"
    name = f"BFCL_v4_{category}.json"
    answers: dict[str, list[Any]] = {}
    if category not in NOTHING:
        for line in read_lines(data / "possible_answer" / name):
            answers[line["id"]] = line["ground_truth"]
    questions = []
    for line in read_lines(data / name)[:: every * SPARSE.get(category, 1)]:
        if "function" in line:
            functions = line["function"]  # none, in a row or two
        else:
            functions = functions_of(data, line["involved_classes"])
        question = Question(
            id=line["id"],
            category=category,
            turns=line["question"],
            tools=[tool_of(function) for function in functions],
            functions=functions,
            answers=answers.get(line["id"], []),
            entry=line,
        )
        questions.append(question)
    return questions


def functions_of(data: Path, classes: list[str]) -> list[dict[str, Any]]:
    """Read the functions of the classes that a conversation is about."""
    config = importlib.import_module("bfcl_eval.constants.executable_backend_config")
    functions = []
    for name in classes:
        file = config.MULTI_TURN_FUNC_DOC_FILE_MAPPING[name]
        functions += read_lines(data / "multi_turn_func_doc" / file)
    return functions


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
    if question.category == TURNS:
        return play(engine, question, strategy, tool_choice)
    mixes: list[FusionWeights] = []
    answer = engine.chat(
        question.turns[0],
        tools=question.tools,
        tool_choice="required" if tool_choice == DRAFTED else tool_choice,
        draft=tool_choice == DRAFTED,
        weights=strategy,
        temperature=0,
        max_tokens=MAX_TOKENS,
        on_weights=mixes.append,
    )
    calls = answer["choices"][0]["message"].get("tool_calls") or []
    if question.category in NOTHING:
        error = "a call" if calls else ""
    else:
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


def play(engine: Engine, question: Question, strategy: str, tool_choice: str) -> Result:
    """Hold a conversation, in which calls are run as their classes say, and check it."""
    utils = importlib.import_module("bfcl_eval.eval_checker.multi_turn_eval.multi_turn_utils")
    checks = importlib.import_module("bfcl_eval.eval_checker.multi_turn_eval.multi_turn_checker")
    offered = {tool["function"]["name"] for tool in question.tools}
    entry = question.entry
    model = f"{strategy}_{tool_choice}"  # instances of the classes are kept by this name
    mixes: list[FusionWeights] = []
    messages: list[Any] = []
    played: list[list[list[str]]] = []  # the calls of each answer of each turn
    n_after = 0
    n_text = 0
    n_repeat = 0
    error = ""
    for turn in question.turns:
        messages += turn
        steps: list[list[str]] = []
        played.append(steps)
        for step in range(MAX_STEPS):
            try:
                answer = engine.chat(
                    messages,
                    tools=question.tools,
                    tool_choice=tool_choice if step == 0 else "auto",
                    weights=strategy,
                    temperature=0,
                    max_tokens=MAX_TOKENS,
                    on_weights=mixes.append,
                )
            except ContextError:
                error = "too long"
                break
            said = answer["choices"][0]["message"]
            calls = said.get("tool_calls") or []
            written = [as_python(call["function"]) for call in calls]
            n_after += step > 0
            n_text += step > 0 and not calls
            n_repeat += bool(calls) and all(any(one in past for past in steps) for one in written)
            messages.append({"role": "assistant", "content": said["content"] or ""})
            if not calls:
                break
            steps.append(written)
            messages[-1]["tool_calls"] = calls
            for call, code in zip(calls, written, strict=True):
                result = "Error: there is no such tool."
                if call["function"]["name"] in offered:
                    (result,), _ = utils.execute_multi_turn_func_call(
                        [code],
                        entry["initial_config"],
                        entry["involved_classes"],
                        model,
                        entry["id"],
                    )
                told = {"role": "tool", "tool_call_id": call["id"], "content": result}
                messages.append(told)
        if error:
            break
    if not error:
        verdict = checks.multi_turn_checker(played, question.answers, entry, TURNS, model)
        error = "" if verdict["valid"] else str(verdict["error_type"])
    taken = {name for mix in mixes for name, mean in mix.means.items() if mean}
    return Result(
        id=question.id,
        category=question.category,
        strategy=strategy,
        tool_choice=tool_choice,
        n_call=sum(len(calls) for steps in played for calls in steps),
        is_right=not error,
        error=error,
        adapters=sorted(taken),
        n_after=n_after,
        n_text=n_text,
        n_repeat=n_repeat,
    )


def as_python(function: Mapping[str, Any]) -> str:
    """Write a call as the checker runs it; arguments that are no object are none."""
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:
        arguments = {}
    if not isinstance(arguments, dict):
        arguments = {}
    listed = [f"{name}={value!r}" for name, value in arguments.items() if name.isidentifier()]
    return f"{function['name']}({', '.join(listed)})"


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
    """Print right answers by strategy, category and choice of tools, and what became of results."""
    cells = defaultdict(list)
    for result in results:
        cells[result.strategy, result.category, result.tool_choice].append(result.is_right)
    print("| strategy | | free | bound | bound, drafted |")
    print("|---|---|--:|--:|--:|")
    for strategy in dict.fromkeys(result.strategy for result in results):
        for category, title in {**CATEGORIES, **NOTHING, TURNS: "several turns"}.items():
            row = [cells[strategy, category, choice] for choice in WAYS]
            counts = [f"{sum(cell)} of {len(cell)}" if cell else "-" for cell in row]
            if any(row):
                print(f"| {strategy} | {title} | {' | '.join(counts)} |")
    print()
    print("| strategy | | answers behind a result | texts | repeated calls |")
    print("|---|---|--:|--:|--:|")
    for strategy in dict.fromkeys(result.strategy for result in results):
        for choice in TOOL_CHOICES:
            of_both = [each for each in results if each.strategy == strategy]
            found = [each for each in of_both if each.tool_choice == choice]
            n_after = sum(each.n_after for each in found)
            n_text = sum(each.n_text for each in found)
            n_repeat = sum(each.n_repeat for each in found)
            print(f"| {strategy} | {choice} | {n_after} | {n_text} | {n_repeat} |")


def main() -> None:
    """Ask what was not asked yet, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", metavar="BUNDLE")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="RESULTS.jsonl")
    parser.add_argument("--strategies", default="base,static", metavar="S,...")
    names = ",".join([*CATEGORIES, *NOTHING, TURNS])
    parser.add_argument("--categories", default=names, metavar="C,...")
    parser.add_argument("--choices", default=",".join(WAYS), metavar="C,...")
    parser.add_argument("--every", type=int, default=4, metavar="N")
    parser.add_argument("--parallel", type=int, default=4, metavar="N")
    parser.add_argument("--threads", type=int, metavar="N")
    args = parser.parse_args()
    checker = checker_module()
    categories = args.categories.split(",")
    questions = []
    for category in categories:
        questions += read_questions(category, args.every)
    questions.sort(key=lambda question: int(question.id.split("-")[0].rpartition("_")[2]))
    results = read_results(args.output)
    done = {(result.id, result.strategy, result.tool_choice) for result in results}
    n_ctx = max(N_CTX.get(category, 4096) for category in categories)
    with (
        Engine(args.bundle, n_ctx=n_ctx, n_parallel=args.parallel, threads=args.threads) as engine,
        args.output.open("a", encoding="utf-8") as output,
        ThreadPoolExecutor(args.parallel) as threads,
    ):
        left = []
        for question in questions:  # all ways of one question, so that a part can be compared
            for strategy in args.strategies.split(","):
                for choice in args.choices.split(","):
                    is_asked = choice == "auto" or question.category not in NOTHING
                    is_asked &= choice != DRAFTED or question.category != TURNS
                    if is_asked and (question.id, strategy, choice) not in done:
                        left.append((question, (strategy, choice)))
        for result in threads.map(lambda one: ask(engine, checker, *one), left):
            results.append(result)
            output.write(json.dumps(asdict(result)) + "\n")
            output.flush()
    print_table(results)


if __name__ == "__main__":
    main()
