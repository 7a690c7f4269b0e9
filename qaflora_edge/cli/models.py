"""qaflora models"""

import json

import click

from qaflora_edge.cli.options import command


@command("qaflora models")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, name by name.")
def models(as_json: bool) -> None:
    """List the models that can be pulled.

    Tells size, kind (chat or base) and licence of each, and where it is when it is here already.
    """
    from qaflora_edge.formats.names import load_registry, local_path

    known = [(model, local_path(model)) for model in load_registry().values()]
    if as_json:
        entries = {
            model.name: {
                "description": model.description,
                "architecture": model.architecture,
                "kind": model.kind,
                "license": model.license,
                "size_bytes": model.size_bytes,
                "sha256": model.sha256,
                "path": None if path is None else str(path),
            }
            for model, path in known
        }
        click.echo(json.dumps(entries))
        return
    width = max((len(model.name) for model, _ in known), default=0)
    for model, path in known:
        click.echo(
            f"{model.name:<{width}}  {model.size_bytes / 1e6:5.0f} MB  {model.kind:<4}  "
            f"{model.description}; {model.license}"
        )
        place = f"here: {path}" if path else f"get it: qaflora pull {model.name}"
        click.echo(f"{'':<{width}}  {place}")
