"""qaflora eval"""

import json
import time
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qaflora_edge.cli import options as cli
from qaflora_edge.cli.compare import expand
from qaflora_edge.cli.output import print_json, progress_bars, say
from qaflora_edge.cli.places import bundle_folder
from qaflora_edge.files import one_line, write_text_atomic

if TYPE_CHECKING:
    from qaflora_edge.engine import Engine
    from qaflora_edge.evaluation.table import Cell
    from qaflora_edge.evaluation.tasks import Record, Results

NOTES = """\
In brackets: 95 % intervals. Differences are paired, above 0 where the strategy is better.
*: the best single adapter, found on these items, in hindsight."""


@cli.command(
    "qaflora eval demo sums.jsonl",
    "qaflora eval demo sums.jsonl chat.jsonl --strategies base,static,qa-flora -o r.jsonl",
    "qaflora eval demo sums.jsonl --limit 20 --json results.json",
)
@cli.bundle_argument
@click.argument("paths", nargs=-1, required=True, metavar="TASK...", type=cli.PATH)
@click.option(
    "--strategies",
    "ways",
    metavar="NAME,NAME,...",
    multiple=True,
    help="What to compare; `single` is each adapter alone. Repeatable.  [default: --strategy, else "
    "all that the bundle can follow]",
)
@click.option(
    "-o",
    "--output",
    "out",
    help="Write each result to FILE as it comes. A file that was begun is resumed.",
    **cli.out_file(metavar="FILE.jsonl"),
)
@click.option(
    "--json",
    "json_path",
    metavar="FILE",
    type=click.Path(dir_okay=False, allow_dash=True),
    help="Write one JSON object with every result to FILE; `-` is stdout.",
)
@click.option("--limit", metavar="N", type=click.IntRange(1), help="Ask N items of each task.")
@click.option(
    "--save",
    is_flag=True,
    help="Make the strategy with the best mean over the tasks the bundle's default.",
)
@cli.shared_options
def eval(
    bundle: str,
    paths: tuple[Path, ...],
    ways: tuple[str, ...],
    out: Path | None,
    json_path: str | None,
    limit: int | None,
    save: bool,
    options: cli.SharedOptions,
) -> None:
    """Score tasks under several strategies.

    TASK... are files of JSON lines: questions with their answers, and how they are asked and
    scored; docs/evaluate.md says how to write one. Every item is asked under every strategy.
    """
    from qaflora_edge.bundles.edit import editing, set_default
    from qaflora_edge.cli.doctor import cpu_name
    from qaflora_edge.evaluation.run import evaluate, header, left
    from qaflora_edge.evaluation.table import best_strategy, cells
    from qaflora_edge.evaluation.tasks import kept_results, read_task

    cli.check_outputs((out, None if json_path == "-" else json_path), paths, added_to=out)
    folder = bundle_folder(bundle)
    if save:
        with editing(folder):  # says now what it would say at the end
            pass
    tasks = [read_task(path) for path in paths]
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise click.UsageError(
            f"Two tasks have one name: {', '.join(names)}, expected different ones: give one of "
            'them another, as in {"task": {"name": "..."}} in its first line.'
        )
    with cli.open_engine(bundle, options) as engine:
        strategies = list(engine.strategies)
        if options.strategy is not None:
            strategies = [options.strategy]
        if ways:
            strategies = expand(",".join(ways), engine.adapters)
        for strategy in strategies:
            engine.use_strategy(strategy)  # says what is wrong with one that cannot be followed
        facts = _option_facts(engine, options)
        head = header(folder, engine, tasks, strategies, facts, cpu_name())
        with kept_results(out, head) as results:
            items = [left(task, strategies, results, limit) for task in tasks]
            records = []
            for task, some in zip(tasks, items, strict=True):
                raw = options.raw_prompt
                records.append(evaluate(engine, task, some, options.sampling, raw_prompt=raw))
            _keep(results, chain.from_iterable(records), sum(map(len, items)))
    document = {**results.header, "results": list(results.records.values())}
    if json_path == "-":
        print_json(document)
    else:
        _print_tables(cells(results))
        if json_path is not None:
            write_text_atomic(json_path, json.dumps(document, ensure_ascii=False) + "\n")
    if save:
        best = best_strategy(results)
        how = results.header["options"]
        set_default(folder, best, lens=how["lens"], pool=how["pool"])
        say(f"The strategy of {folder} is {best} from now on.")
    click.get_current_context().exit(1 if results.failed else 0)


def _option_facts(engine: "Engine", options: cli.SharedOptions) -> dict[str, Any]:
    known = engine.memory.current.weigher.known
    facts: dict[str, Any] = {
        "lens": known.lens,
        "pool": known.pool,
        "prefill": known.prefill,
        "system": engine.system,
    }
    for key in ("n_ctx", "kv_type", "flash_attn", "adapter_type"):
        facts[key] = options.engine[key]
    facts |= options.keywords("sampling")
    facts["raw_prompt"] = options.raw_prompt
    facts["stop"] = list(facts["stop"])
    return facts


def _keep(results: "Results", records: "Iterable[Record]", n_asked: int) -> None:
    start = time.perf_counter()
    n_before = len(results.records)
    n_done = 0
    n_token = 0
    try:
        with progress_bars() as tell:
            for n_done, record in enumerate(records, 1):
                results.add(record)
                n_token += record.get("n_token", 0)
                tell("Evaluating", n_done, n_asked)
    finally:  # also of Ctrl-C
        phrases = [f"{n_done} results in {time.perf_counter() - start:.0f} s, {n_token} tokens"]
        if n_before:
            phrases.append(f"{n_before} were there before")
        if failed := results.failed:
            first = "{task}, item {item}: {error}".format_map(failed[0])
            phrases.append(f"{len(failed)} failed, the first: {first}")
        say(f"[{one_line('; '.join(phrases))}]")


def _print_tables(results: "Sequence[Cell]") -> None:
    from qaflora_edge.evaluation.table import NATS, POINTS, estimate, heads, rows
    from qaflora_edge.show import columns, crop

    tables = []
    for cell in results:
        title = f"{cell.task['name']}: {cell.task['metric']}, {cell.unit}"
        tables.append((title, [cell]))
    for unit in (POINTS, NATS):
        alike = [cell for cell in results if cell.unit == unit]
        if len(alike) > 1:
            tables.append((f"all {len(alike)} tasks in {unit}, each counts the same", alike))
    for title, group in tables:
        lines = [["", *heads(group), "items"]]
        for strategy, (score, *gains) in rows(group).items():
            texts = [estimate(gain, group[0].unit, is_difference=True) for gain in gains]
            lines.append([strategy, estimate(score, group[0].unit), *texts, str(score.n_item)])
        shown = [[crop(text, 200) for text in line] for line in _without_empty(lines)]
        click.echo("\n".join([crop(title, 200), *columns(shown), ""]))
    click.echo(NOTES)


def _without_empty(lines: Sequence[Sequence[str]]) -> list[list[str]]:
    """Leave out the columns that have no value: there was nothing to compare with."""
    from qaflora_edge.evaluation.table import NONE

    heads, *others = lines
    kept = []
    for column in range(len(heads)):
        if any(line[column] != NONE for line in others):
            kept.append(column)
    return [[line[column] for column in kept] for line in lines]
