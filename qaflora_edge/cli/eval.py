"""qaflora eval"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qaflora_edge.cli.compare import expand
from qaflora_edge.cli.eval_tasks import (
    HALVES,
    asked_under,
    check_code,
    check_names,
    choose,
    header,
    span,
)
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


@command(
    "qaflora eval models/demo sums.jsonl",
    "qaflora eval models/demo sums.jsonl chat.jsonl --strategies base,static,qa-flora -o r.jsonl",
    "qaflora eval models/demo humaneval.jsonl --allow-code --limit 20",
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
    help="Write each result to FILE as it comes. A file that was begun is gone on with.",
    **out_file(metavar="FILE.jsonl"),
)
@click.option(
    "--json",
    "json_path",
    metavar="FILE",
    type=click.Path(dir_okay=False, allow_dash=True),
    help="Write one JSON object with every result to FILE; `-` is stdout.",
)
@click.option(
    "--html",
    help="Write a page that stands alone, with every item, to FILE; with --layers.",
    **out_file(),
)
@click.option("--adapters", metavar="NAME,NAME,...", help="The adapters in use.  [default: all]")
@click.option("--limit", metavar="N", type=click.IntRange(1), help="Ask N items of each task.")
@click.option("--items", metavar="A:B", callback=span, help="Ask items A to B - 1, from 0.")
@click.option(
    "--half",
    type=click.Choice(HALVES),
    help="Ask one half of the items: dev has 0, 2, 4, ..., test has 1, 3, 5, ...",
)
@click.option("--layers", is_flag=True, help="Keep the weights of every layer in the results.")
@click.option(
    "--allow-code",
    is_flag=True,
    help="Run the code that the model writes, for tasks that test it: see docs/evaluate.md.",
)
@click.option(
    "--save",
    is_flag=True,
    help="Make the strategy with the best mean over the tasks the bundle's default, and note the "
    "evidence in bundle.json.",
)
@shared_options
def eval(
    bundle: str,
    tasks: tuple[Path, ...],
    ways: tuple[str, ...],
    out: Path | None,
    json_path: str | None,
    html: Path | None,
    adapters: str | None,
    limit: int | None,
    items: range | None,
    half: str | None,
    layers: bool,
    allow_code: bool,
    save: bool,
    options: SharedOptions,
) -> None:
    """Score tasks under several strategies.

    TASK... are files of JSON lines: questions with their answers, and how they are asked and
    scored; docs/evaluate.md says how to write one. Every item is asked under every strategy, many
    at once (--parallel).
    """
    from qaflora_edge.evaluation.results import ResultsFile
    from qaflora_edge.evaluation.run import Asking, Evaluation
    from qaflora_edge.evaluation.statistics import check_can_estimate
    from qaflora_edge.evaluation.tasks import read_task

    check_can_estimate()
    check_outputs((out, html, None if json_path == "-" else json_path), tasks, added_to=out)
    if save:
        _check_can_save(bundle, adapters)
    read = [read_task(path) for path in tasks]
    check_names(read)
    check_code(read, allow_code)
    chosen = choose(read, limit=limit, items=items, half=half)
    layers = layers or html is not None
    asking = Asking(options.sampling, raw_prompt=options.raw_prompt, has_layers=layers)
    with open_engine(bundle, options) as engine:
        if adapters is not None:
            engine.use_strategy("base")  # one that names no adapter
            engine.use_adapters(adapters.split(","))
        strategies = _strategies(engine, ways, options.strategy)
        told = asked_under(engine, asking, options)
        head = header(bundle_folder(bundle), engine, read, strategies, asking, told)
        file = ResultsFile(out, head)
        with file.opened():
            evaluation = Evaluation(engine, read, strategies, file, items=chosen, asking=asking)
            _run(evaluation)
    _show(file.results, json_path, html)
    if save:
        _save(bundle, file.results)
    click.get_current_context().exit(1 if evaluation.n_failed else 0)


def _check_can_save(bundle: str, adapters: str | None) -> None:
    from qaflora_edge.bundles.edit import check_can_change

    if adapters is not None:
        raise click.UsageError(
            "--save is for a bundle with all of its adapters, and --adapters takes some; leave "
            "one of the two out."
        )
    check_can_change(bundle_folder(bundle))


def _save(bundle: str, results: Results) -> None:
    from qaflora_edge.bundles.edit import set_default
    from qaflora_edge.evaluation.best import best_strategy, evidence

    folder, strategy = bundle_folder(bundle), best_strategy(results)
    options = results.header["options"]
    set_default(
        folder,
        strategy,
        lens=options["lens"],
        pool=options["pool"],
        evidence=evidence(results, strategy),
    )
    click.echo(f"The strategy of {folder} is {strategy} from now on.", err=True)


def _strategies(engine: Engine, ways: Sequence[str], strategy: str | None) -> list[str]:
    if ways:
        found = expand(",".join(ways), engine.adapters)
    else:
        found = list(engine.strategies) if strategy is None else [strategy]
    for each in found:
        engine.use_strategy(each)  # says what is wrong with one that cannot be followed
    return found


def _run(evaluation: Evaluation) -> None:
    """Ask what is left, with a bar on a terminal, and say at the end what was done."""
    n_left, n_done, n_token, start = evaluation.n_left, 0, 0, time.perf_counter()

    def say_sum() -> None:
        seconds = time.perf_counter() - start
        parts = [f"{n_done} results in {seconds:.0f} s, {n_token} tokens"]
        if n_before := evaluation.n_before:
            parts.append(f"{n_before} were there before")
        if evaluation.n_failed:
            parts.append(f"{evaluation.n_failed} failed, the first: {evaluation.first_failure}")
        click.echo(f"[{one_line('; '.join(parts))}]", err=True)

    with progress_bars() as bar:

        def tell(n: int) -> None:
            nonlocal n_done, n_token
            n_done, n_token = n_done + 1, n_token + n
            bar("Evaluating", n_done, n_left)

        try:
            evaluation.run(tell)
        except (KeyboardInterrupt, SystemExit):  # SIGTERM
            say_sum()
            raise
    say_sum()


def _show(results: Results, json_path: str | None, html: Path | None) -> None:
    from qaflora_edge.cli.eval_table import table
    from qaflora_edge.evaluation.summary import summarise

    found = summarise([("", results)])
    if json_path != "-":
        click.echo(table(found))
    if html is not None:
        from qaflora_edge.cli.eval_html import eval_html

        write_text_atomic(html, eval_html(found))
    if json_path is not None:
        document = {**results.header, "results": list(results.records)}
        text = json.dumps(document, ensure_ascii=json_path == "-")
        if json_path == "-":
            click.echo(text)
        else:
            write_text_atomic(json_path, text + "\n")
