"""qaflora pull, models, list and remove: what is here, and what the Hub has"""

import sys
from functools import partial

import click

from qaflora_edge.cli.options import command, json_option
from qaflora_edge.cli.output import print_json, progress_bars, say
from qaflora_edge.files import one_line


@command(
    "qaflora pull smollm2-135m-instruct",
    "qaflora pull owner/my-bundle --with-base",
    "qaflora pull owner/my-bundle@v1",
)
@click.argument("ref")
@click.option(
    "--with-base", is_flag=True, help="Fetch the base of a bundle too, when it is not here."
)
@click.option(
    "--update", is_flag=True, help="Ask the Hub for a newer commit than the one that is here."
)
def pull(ref: str, with_base: bool, update: bool) -> None:
    """Fetch a model, an adapter or a bundle.

    REF is a name from `qaflora models`, or a Hugging Face Hub repository as owner/name or
    owner/name/file.gguf, each with @revision to pin it; the address of its page works too. What
    comes from the Hub goes to its own cache, shared with other tools. Files that are here are not
    fetched again. Prints where it is.
    """
    from qaflora_edge.bundles.open import recorded_base
    from qaflora_edge.bundles.source import fetch_base
    from qaflora_edge.formats.bundle import read_bundle_text
    from qaflora_edge.formats.names import from_address, load_registry
    from qaflora_edge.hub import fetch_hub, fetch_model

    ref = from_address(ref)
    with progress_bars() as tell:
        if ref in load_registry() or "/" not in ref:
            path = fetch_model(ref, progress=partial(tell, ref))
        else:
            path = fetch_hub(ref, update=update)
            base = read_bundle_text(path).base if with_base else None
            if base is not None and recorded_base(path, base) is None:
                fetch_base(path, base, partial(tell, "base"))
    click.echo(str(path))


@command("qaflora models")
def models() -> None:
    """List the models that can be pulled.

    Tells size, kind (chat or base) and licence of each, and where it is when it is here already.
    """
    from qaflora_edge.formats.names import load_registry, local_path

    for model in load_registry().values():
        path = local_path(model)
        how = f"here: {path}" if path else f"get it: qaflora pull {model.name}"
        click.echo(
            f"{model.name}: {model.description}; {model.size_bytes / 1e6:.0f} MB, {model.kind}, "
            f"{model.license}\n  {how}"
        )


@command("qaflora list", "qaflora list --json", name="list")
@json_option("Print one JSON array.")
def list_here(as_json: bool) -> None:
    """List the bundles and bases that are here.

    Lists bundles of the working folder and of the setting `bundles`, and all that was pulled: the
    name that commands take, the size and the place.
    """
    from qaflora_edge.hub import all_here

    entries = []
    for here in all_here():
        entry = {key: getattr(here, key) for key in ("kind", "name", "size_bytes", "is_pulled")}
        entry["path"] = str(here.path)
        entries.append(entry)
    if as_json:
        print_json(entries)
        return
    if not entries:
        say("Nothing is here yet; see `qaflora models`, and `qaflora bundle create`.")
    width = max((len(entry["name"]) for entry in entries), default=0)
    for entry in entries:
        size = f"{entry['size_bytes'] / 1e6:6.0f} MB"
        mark = "pulled  " if entry["is_pulled"] else ""
        row = f"{entry['kind']:<7}  {entry['name']:<{width}}  {size}  {mark}{entry['path']}"
        click.echo(one_line(row))


@command("qaflora remove smollm2-135m-instruct", "qaflora remove owner/name --yes")
@click.argument("name")
@click.option("--yes", "-y", "is_sure", is_flag=True, help="Do not ask.")
def remove(name: str, is_sure: bool) -> None:
    """Remove a model, an adapter or a bundle that was pulled.

    NAME is one that `qaflora list` shows as pulled; files and folders of your own stay. Files of
    the Hub lie in a cache that other tools share: the whole commit is gone for them too.
    """
    from qaflora_edge.hub import find_pulled, remove_pulled

    here, *others = find_pulled(name)
    what = f"the {here.kind} {here.name} ({here.size_bytes / 1e6:.0f} MB, {here.path})"
    if others:
        what += f", and with it {', '.join(other.name for other in others)}"
    if not is_sure:
        if not sys.stdin.isatty():
            raise click.UsageError(f"This removes {what}; add --yes where nobody can be asked.")
        click.confirm(f"Remove {what}?", abort=True, err=True)
    remove_pulled(here)
    say(f"Removed {what}.")
