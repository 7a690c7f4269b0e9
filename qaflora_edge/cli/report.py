"""qaflora report"""

import json
from pathlib import Path

import click

from qaflora_edge.cli.options import check_outputs, command, out_file


@command(
    "qaflora report results.jsonl",
    "qaflora report results/*.jsonl --html report.html",
    "qaflora report results/*.jsonl.gz --markdown report.md",
)
@click.argument(
    "files", nargs=-1, required=True, metavar="FILE...", type=click.Path(path_type=Path)
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with every number.")
@click.option(
    "--html", help="Write a page that stands alone, with every item, to FILE.", **out_file()
)
@click.option("--markdown", help="Write the tables as Markdown to FILE.", **out_file())
@click.option(
    "--prose",
    metavar="FILE",
    help="Text of your own for --markdown; the tables stand in place of its line "
    "<!-- results -->, or below it.",
)
def report(
    files: tuple[Path, ...],
    as_json: bool,
    html: Path | None,
    markdown: Path | None,
    prose: str | None,
) -> None:
    """Show what results of `qaflora eval` say.

    FILE... are what `qaflora eval -o` has written, also packed by gzip. Those of one base, as many
    adapters and the same options are put together, so that tasks may be in files of their own;
    others get sections of their own.
    """
    if prose is not None and markdown is None:
        raise click.UsageError("--prose is part of a page: give it with --markdown FILE.")
    from qaflora_edge.cli.prompts import read_text
    from qaflora_edge.evaluation.results import read_results
    from qaflora_edge.evaluation.statistics import check_can_estimate
    from qaflora_edge.evaluation.summary import summarise
    from qaflora_edge.files import write_text_atomic

    check_can_estimate()
    check_outputs((html, markdown), files)
    words = "" if prose is None else read_text(prose)
    found = summarise([(str(path), read_results(path)) for path in files])
    if html is not None:
        from qaflora_edge.cli.eval_html import eval_html

        write_text_atomic(html, eval_html(found))
    if markdown is not None:
        from qaflora_edge.cli.eval_markdown import eval_markdown

        write_text_atomic(markdown, eval_markdown(found, words))
    if as_json:
        from qaflora_edge.cli.eval_words import as_json_object

        click.echo(json.dumps({"sections": list(map(as_json_object, found))}))
    elif html is None and markdown is None:
        from qaflora_edge.cli.eval_table import table

        click.echo(table(found))
