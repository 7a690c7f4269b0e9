"""qaflora fit"""

import click

from qaflora_edge.cli.answers import print_json
from qaflora_edge.cli.eval_tasks import HALVES
from qaflora_edge.cli.options import (
    BUNDLE,
    SharedOptions,
    bundle_folder,
    command,
    open_engine,
    own_options,
    shared_options,
)
from qaflora_edge.cli.progress import progress_bars
from qaflora_edge.errors import BundleError


@command(
    "qaflora fit my-bundle sums.jsonl",
    "qaflora fit my-bundle sums.jsonl --examples 5 --half dev --name five",
    'qaflora run my-bundle "What is 17 times 6?" --strategy fitted:five',
)
@click.argument("bundle", **BUNDLE)
@click.argument("task", metavar="TASK", type=click.Path(dir_okay=False))
@click.option("--name", metavar="NAME", help="Of what is fitted.  [default: the task's]")
@click.option("--adapters", metavar="NAME,NAME,...", help="The adapters to mix.  [default: all]")
@click.option(
    "--half",
    type=click.Choice(HALVES),
    help="Take examples from one half of the items, to evaluate on the other: dev has 0, 2, 4, "
    "..., test has 1, 3, 5, ...",
)
@click.option("--json", "as_json", is_flag=True, help="Print what bundle.json has of it now.")
@own_options
@shared_options
def fit(
    bundle: str,
    task: str,
    name: str | None,
    adapters: str | None,
    half: str | None,
    as_json: bool,
    method: str,
    examples: int,
    budget: int,
    options: SharedOptions,
) -> None:
    """Fit a mix to examples with right answers.

    TASK is a file as `qaflora eval` takes it. Weights are searched that make the right answers
    of a few of its items likely, one number for each adapter, without gradients (LoRAHub). What is
    found is kept in bundle.json with its evidence, for the strategy fitted:NAME. A search that was
    ended goes on where it was when it is started again.
    """
    from qaflora_edge.evaluation.tasks import read_task
    from qaflora_edge.fitting.fit import choose
    from qaflora_edge.fitting.fit import fit as fit_bundle

    read = read_task(task)
    folder = bundle_folder(bundle)
    if not folder.is_dir():
        raise BundleError(
            f"Cannot fit {folder}: it is no bundle's folder, expected one that can be changed. "
            "Make one with `qaflora bundle create`."
        )
    seed = options.seed
    first = 0 if half is None else HALVES.index(half)
    items = choose(range(first, len(read.items), 1 if half is None else 2), examples, seed)
    options.strategy = "base"  # what the bundle has by default may be what is fitted now
    with open_engine(bundle, options) as engine, progress_bars() as progress:
        if adapters is not None:
            engine.use_adapters(adapters.split(","))
        name = name or read.name
        record = fit_bundle(
            folder,
            engine,
            read,
            items,
            name=name,
            budget=budget,
            seed=seed,
            raw_prompt=options.raw_prompt,
            tell=lambda search: progress("fit", len(search.tried), budget),
        )
    if as_json:
        print_json(record)
    weights = ", ".join(f"{key} {weight:.2f}" for key, weight in record["weights"].items())
    loss = record["loss"]
    click.echo(
        f"Fitted {weights}: loss {loss['base']:.4f} without adapters, {loss['fitted']:.4f} with "
        f"them, on {examples} examples. Use it with --strategy fitted:{name}.",
        err=True,
    )
