"""qaflora push"""

import sys
from pathlib import Path
from typing import Any

import click

from qaflora_edge.cli.options import command
from qaflora_edge.cli.progress import progress_bars


@command(
    "qaflora push my-bundle owner/my-bundle --private",
    'qaflora push math.gguf owner/math-lora --message "Two more epochs"',
)
@click.argument("path", metavar="PATH", type=click.Path(path_type=Path))
@click.argument("repo", metavar="OWNER/NAME")
@click.option("--private", is_flag=True, help="Make the repository private.")
@click.option("--revision", metavar="BRANCH", help="The branch that gets it.  [default: main]")
@click.option("--message", metavar="TEXT", help="What the commit says.")
def push(path: Path, repo: str, **options: Any) -> None:
    """Push a bundle or an adapter to the Hub.

    PATH is a bundle's folder, a PEFT folder or an adapter .gguf, OWNER/NAME the repository, which
    is made when there is none. PATH is checked first, and goes as one commit: the files that
    belong to it, and a card when there is none. The token is the one of
    `hf auth login` or HF_TOKEN. Prints the reference that pins the commit.
    """
    from huggingface_hub.utils.tqdm import disable_progress_bars

    from qaflora_edge.bundles.push import push as push_path

    if not sys.stderr.isatty():
        disable_progress_bars()  # the Hub's library draws them anywhere
    with progress_bars() as progress:
        pushed = push_path(path, repo, progress=progress, **options)
    click.echo(f"Pushed {', '.join(pushed.files)}: {pushed.url}", err=True)
    click.echo(pushed.pinned)
