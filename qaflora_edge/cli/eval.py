"""qaflora eval"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qaflora_edge.cli.compare import expand
from qaflora_edge.cli.options import (
    BUNDLE,
    SharedOptions,
    bundle_folder,
    check_outputs,
    command,
    open_engine,
    out_file,
    shared_options,
)
from qaflora_edge.cli.progress import progress_bars
from qaflora_edge.files import one_line, write_text_atomic

if TYPE_CHECKING:
    from qaflora_edge.engine import Engine
    from qaflora_edge.evaluation.results import Results
    from qaflora_edge.evaluation.run import Evaluation
    from qaflora_edge.evaluation.statistics import Estimate
    from qaflora_edge.evaluation.table import Cell
    from qaflora_edge.evaluation.tasks import Task

NOTES = """\
In brackets: 95 % intervals. Differences are paired, above 0 where the strategy is better.
*: the best single adapter, found on these items, in hindsight."""


@command(
    "qaflora eval models/demo sums.jsonl",
    "qaflora eval models/demo sums.jsonl chat.jsonl --strategies base,static,qa-flora -o r.jsonl",
    "qaflora eval models/demo sums.jsonl --limit 20 --html results.html",
)
@click.argument("bundle", **BUNDLE)
@click.argument(
    "tasks", nargs=-1, required=True, metavar="TASK...", type=click.Path(path_type=Path)
)
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
    **out_file(metavar="FILE.jsonl"),
)
@click.option(
    "--json",
    "json_path",
    metavar="FILE",
    type=click.Path(dir_okay=False, allow_dash=True),
    help="Write one JSON object with every result to FILE; `-` is stdout.",
)
@click.option("--html", help="Write one page with bars and every item to FILE.", **out_file())
@click.option("--limit", metavar="N", type=click.IntRange(1), help="Ask N items of each task.")
@click.option(
    "--save",
    is_flag=True,
    help="Make the strategy with the best mean over the tasks the bundle's default.",
)
@shared_options
def eval(
    bundle: str,
    tasks: tuple[Path, ...],
    ways: tuple[str, ...],
    out: Path | None,
    json_path: str | None,
    html: Path | None,
    limit: int | None,
    save: bool,
    options: SharedOptions,
) -> None:
    """Score tasks under several strategies.

    TASK... are files of JSON lines: questions with their answers, and how they are asked and
    scored; docs/evaluate.md says how to write one. Every item is asked under every strategy, many
    at once (--parallel).
    """
    from qaflora_edge.bundles.edit import editing
    from qaflora_edge.cli.doctor import cpu_name
    from qaflora_edge.evaluation.results import ResultsFile
    from qaflora_edge.evaluation.run import Evaluation, header
    from qaflora_edge.evaluation.tasks import read_task

    check_outputs((out, html, None if json_path == "-" else json_path), tasks, added_to=out)
    if save:
        with editing(bundle_folder(bundle)):  # says now what it would say at the end
            pass
    read = [read_task(path) for path in tasks]
    _check_names(read)
    sampling, raw_prompt = options.sampling, options.raw_prompt
    with open_engine(bundle, options) as engine:
        strategies = _strategies(engine, ways, options.strategy)
        file = ResultsFile(
            out,
            header(
                bundle_folder(bundle),
                engine,
                read,
                strategies,
                _asked_under(engine, options),
                cpu_name(),
            ),
        )
        with file.opened():
            _run(Evaluation(engine, read, strategies, file, limit, sampling, raw_prompt))
    _show(file.results, json_path, html)
    if save:
        _save(bundle_folder(bundle), file.results)
    click.get_current_context().exit(1 if file.results.failed else 0)


def _check_names(tasks: Sequence[Task]) -> None:
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise click.UsageError(
            f"Two tasks have one name: {', '.join(names)}, expected different ones: give one of "
            'them another, as in {"task": {"name": "..."}} in its first line.'
        )


def _strategies(engine: Engine, ways: Sequence[str], strategy: str | None) -> list[str]:
    if ways:
        found = expand(",".join(ways), engine.adapters)
    else:
        found = list(engine.strategies) if strategy is None else [strategy]
    for each in found:
        engine.use_strategy(each)  # says what is wrong with one that cannot be followed
    return found


def _asked_under(engine: Engine, options: SharedOptions) -> dict[str, Any]:
    """Collect the options that a results file tells."""
    found = {"lens": engine.lens, "pool": engine.pool, "system": engine.system or ""}
    keys = ("n_ctx", "kv_type", "flash_attn", "adapter_type")
    found |= {key: options.engine[key] for key in keys}
    found |= {**options.sampling, "raw_prompt": options.raw_prompt}
    return {**found, "stop": list(found["stop"])}


def _run(evaluation: Evaluation) -> None:
    """Ask what is left, with a bar on a terminal, and say at the end what was done."""
    file, start = evaluation.file, time.perf_counter()
    n_left = sum(len(list(evaluation.left(task))) for task in evaluation.tasks)
    n_before, n_token = len(file.records), 0
    try:
        with progress_bars() as bar:

            def tell(n: int) -> None:
                nonlocal n_token
                n_token += n
                bar("Evaluating", len(file.records) - n_before, n_left)

            evaluation.tell = tell
            evaluation.run()
    finally:  # also of Ctrl-C
        seconds = time.perf_counter() - start
        parts = [f"{len(file.records) - n_before} results in {seconds:.0f} s, {n_token} tokens"]
        if n_before:
            parts.append(f"{n_before} were there before")
        if failed := file.results.failed:
            first = "{task}, item {item}: {error}".format_map(failed[0])
            parts.append(f"{len(failed)} failed, the first: {first}")
        click.echo(f"[{one_line('; '.join(parts))}]", err=True)


def _show(results: Results, json_path: str | None, html: Path | None) -> None:
    from qaflora_edge.evaluation.table import cells

    found = cells(results)
    document = json.dumps(
        {**results.header, "results": list(results.records)}, ensure_ascii=json_path == "-"
    )
    if json_path == "-":
        click.echo(document)
    else:
        _print_tables(found)
    if json_path not in (None, "-"):
        write_text_atomic(str(json_path), document + "\n")
    if html is not None:
        from qaflora_edge.show.pages import results_page

        head = results.header
        title = f"Evaluation of {head['bundle']} on {head['base']['name']}"
        facts = {"strategies": ", ".join(results.strategies), **head["options"]}
        facts |= {"version": head["version"], "machine": head["machine"]}
        write_text_atomic(html, results_page(title, facts, [_task_shown(cell) for cell in found]))


def _print_tables(found: Sequence[Cell]) -> None:
    """Print a table for each task, then one over all tasks of a unit where there are several."""
    from qaflora_edge.evaluation.table import NATS, POINTS, estimate, heads, rows
    from qaflora_edge.show.text import columns, crop

    tables = [(f"{cell.name}: {cell.task['metric']}, {cell.unit}", [cell]) for cell in found]
    for unit in (POINTS, NATS):
        alike = [cell for cell in found if cell.unit == unit]
        if len(alike) > 1:
            tables.append((f"all {len(alike)} tasks in {unit}, each counts the same", alike))
    for title, each in tables:
        lines = [["", *heads(each), "items"]]
        for strategy, (score, *gains) in rows(each).items():
            texts = (estimate(gain, each[0].unit, is_difference=True) for gain in gains)
            lines.append([strategy, estimate(score, each[0].unit), *texts, str(score.n_item)])
        shown = [[crop(text, 200) for text in line] for line in lines]
        click.echo("\n".join([crop(title, 200), *columns(shown), ""]))
    click.echo(NOTES)


def _task_shown(cell: Cell) -> dict[str, Any]:
    """Write a task as `results_page` takes it."""
    from qaflora_edge.evaluation.table import estimate, heads, rows

    def bar(
        found: Estimate | None, *, is_difference: bool
    ) -> tuple[str, float, float, float] | None:
        if found is None:
            return None
        text = estimate(found, cell.unit, is_difference=is_difference)
        return text, found.value, found.low, found.high

    return {
        "name": cell.name,
        "metric": cell.task["metric"],
        "heads": heads([cell]),
        "lines": {
            strategy: [bar(each, is_difference=at > 0) for at, each in enumerate(row)]
            for strategy, row in rows([cell]).items()
        },
        "entries": [
            _item_shown(cell, item)
            for item in sorted({item for rows in cell.rows.values() for item in rows})
        ],
    }


def _item_shown(cell: Cell, index: int) -> dict[str, Any]:
    from qaflora_edge.evaluation.table import number
    from qaflora_edge.show.text import crop, who_spoke

    given = {strategy: rows[index] for strategy, rows in cell.rows.items() if index in rows}
    first = next(iter(given.values()))
    answers = [
        {
            "strategy": strategy,
            "score": "failed"
            if row["score"] is None
            else number(cell.factor * row["score"], cell.unit),
            "mix": who_spoke(row["weights"]),
            "text": row["error"] or row["answer"] or "",
        }
        for strategy, row in given.items()
    ]
    told = {key: first[key] for key in ("question", "expected")}
    return {"index": index, "title": crop(told["question"], 90), **told, "answers": answers}


def _save(folder: Path, results: Results) -> None:
    from qaflora_edge.bundles.edit import set_default
    from qaflora_edge.evaluation.table import best_strategy

    strategy, options = best_strategy(results), results.header["options"]
    set_default(folder, strategy, lens=options["lens"], pool=options["pool"])
    click.echo(f"The strategy of {folder} is {strategy} from now on.", err=True)
