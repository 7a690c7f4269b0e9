"""qaflora pull"""

from functools import partial
from pathlib import Path

import click

from qaflora_edge.cli.options import command, completed_by
from qaflora_edge.cli.progress import progress_bars
from qaflora_edge.progress import TellCount


@command(
    "qaflora pull smollm2-135m-instruct",
    "qaflora pull owner/my-bundle --with-base",
    "qaflora pull owner/my-bundle@v1 --to my-bundle",
)
@click.argument("ref", shell_complete=completed_by("complete_model"))
@click.option(
    "--to",
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
    help="The folder that gets it.  [default: the cache]",
)
@click.option(
    "--with-base", is_flag=True, help="Fetch the base of a bundle too, when it is not here."
)
@click.option(
    "--update", is_flag=True, help="Ask the Hub for a newer commit than the one that is here."
)
def pull(ref: str, to: Path | None, with_base: bool, update: bool) -> None:
    """Fetch a model, an adapter or a bundle.

    REF is a name from `qaflora models`, or a Hugging Face Hub repository as owner/name or
    owner/name/file.gguf, each with @revision where one is to be pinned; the address of its page
    will do as well. Without --to it goes to
    the Hub's own cache, shared with other tools. What is here already is not fetched again.
    Prints where it is.
    """
    from qaflora_edge.formats.names import from_address, load_registry
    from qaflora_edge.hub.fetch import fetch_hub, fetch_model

    ref = from_address(ref)
    with progress_bars() as tell:
        if ref in load_registry() or "/" not in ref:
            path = fetch_model(ref, to=to, progress=partial(tell, ref))
        else:
            path = fetch_hub(ref, to=to, update=update)
            if with_base:
                _fetch_base(path, partial(tell, "base"))
    click.echo(str(path))


def _fetch_base(folder: Path, progress: TellCount) -> None:
    from qaflora_edge.bundles.open import recorded_base
    from qaflora_edge.bundles.source import fetch_base
    from qaflora_edge.errors import BundleError
    from qaflora_edge.formats.bundle import BUNDLE_FILE, read_bundle_text

    if not (folder / BUNDLE_FILE).exists():
        raise BundleError(
            f"Pulled {folder}, which is no bundle: only {BUNDLE_FILE} names a base; expected a "
            "bundle with --with-base. Leave it out, and pull the base by its own name."
        )
    base = read_bundle_text(folder).base
    if recorded_base(folder, base) is None:
        fetch_base(folder, base, progress)
