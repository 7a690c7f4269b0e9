"""qaflora remove"""

import sys

import click

from qaflora_edge.cli.options import command, completed_by


@command("qaflora remove smollm2-135m-instruct", "qaflora remove owner/name --yes")
@click.argument("name", shell_complete=completed_by("complete_pulled"))
@click.option("--yes", "-y", "is_sure", is_flag=True, help="Do not ask.")
def remove(name: str, is_sure: bool) -> None:
    """Remove a model, an adapter or a bundle that was pulled.

    NAME is one that `qaflora list` shows as pulled; files and folders of your own stay. What came
    from the Hub lies in a cache that other tools share, and is gone for them too: all files of its
    commit. It can be pulled again.
    """
    from qaflora_edge.hub.local import find_pulled, remove_pulled

    here, *others = find_pulled(name)
    what = f"the {here.kind} {here.name} ({here.size_bytes / 1e6:.0f} MB, {here.path})"
    if others:
        what += f", and with it {', '.join(each.name for each in others)}"
    if not is_sure:
        if not sys.stdin.isatty():
            raise click.UsageError(f"This removes {what}; add --yes where nobody can be asked.")
        click.confirm(f"Remove {what}?", abort=True, err=True)
    remove_pulled(here)
    click.echo(f"Removed {what}.", err=True)
