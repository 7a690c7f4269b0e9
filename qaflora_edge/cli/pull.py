"""qaflora pull"""

from __future__ import annotations

from pathlib import Path

import click

from qaflora_edge.cli.options import example
from qaflora_edge.cli.progress import progress_bars


@click.command(
    epilog=example(
        """
        qaflora pull smollm2-135m-instruct
        qaflora pull owner/my-bundle --to my-bundle
        """
    )
)
@click.argument("ref")
@click.option(
    "--to",
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
    help="The folder that gets it.  [default: the cache]",
)
def pull(ref: str, to: Path | None) -> None:
    """Fetch a model or a bundle.

    REF is a name from `qaflora models`, or a Hugging Face Hub repository as owner/name or
    owner/name/file.gguf. What is here already is not fetched again. Prints where it is.
    """
    from qaflora_edge.hub import fetch_hub_bundle
    from qaflora_edge.registry import fetch_model, load_registry

    is_hub = ref not in load_registry() and "/" in ref
    with progress_bars() as tell:
        report = None if tell is None else lambda done, total: tell(ref, done, total)
        path = (fetch_hub_bundle if is_hub else fetch_model)(ref, to=to, progress=report)
    click.echo(str(path))
