"""qaflora list"""

import json

import click

from qaflora_edge.cli.options import command


@command("qaflora list", "qaflora list --json", name="list")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON array.")
def listing(as_json: bool) -> None:
    """List the bundles and bases that are here.

    Bundles of the working folder and of the setting `bundles`, and all that was pulled: each with
    the name by which a command takes it, its size without a base of its own entry, and where it is.
    """
    from qaflora_edge.files import one_line
    from qaflora_edge.hub.local import all_here

    found = [here.to_dict() for here in all_here()]
    if as_json:
        click.echo(json.dumps(found))
        return
    if not found:
        click.echo(
            "Nothing is here yet; see `qaflora models`, and `qaflora bundle create`.", err=True
        )
    width = max((len(entry["name"]) for entry in found), default=0)
    for entry in found:
        click.echo(
            one_line(
                f"{entry['kind']:<7}  {entry['name']:<{width}}  {entry['size_bytes'] / 1e6:6.0f} MB"
                f"  {'pulled  ' if entry['is_pulled'] else ''}{entry['path']}"
            )
        )
