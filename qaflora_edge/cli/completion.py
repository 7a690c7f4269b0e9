"""qaflora completion"""

import os
from pathlib import Path

import click

from qaflora_edge.cli.complete import SHELLS, script
from qaflora_edge.cli.options import command

PROGRAM = "qaflora"


def script_path(shell: str) -> Path:
    """Where a shell finds completions of its user without being told."""
    home = Path.home()
    data = Path(os.environ.get("XDG_DATA_HOME") or home / ".local" / "share")
    config = Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config")
    return {
        "bash": data / "bash-completion" / "completions" / PROGRAM,
        "zsh": data / "zsh" / "site-functions" / f"_{PROGRAM}",
        "fish": config / "fish" / "completions" / f"{PROGRAM}.fish",
    }[shell]


def hint(shell: str, path: Path) -> str:
    """What a user has to know for the script to be found."""
    return {
        "bash": "New shells have it where bash-completion is set up; "
        f"else add to ~/.bashrc: source {path}",
        "zsh": f"Add to ~/.zshrc, before compinit: fpath=({path.parent} $fpath)",
        "fish": "New shells have it.",
    }[shell]


@command("qaflora completion bash --install", "qaflora completion zsh > _qaflora")
@click.argument("shell", type=click.Choice(SHELLS))
@click.option("--install", is_flag=True, help="Write it where the shell looks for it.")
def completion(shell: str, install: bool) -> None:
    """Print or install completion for a shell.

    It completes commands, options, bundles, strategies, and the names of a bundle's adapters and
    of models. SHELL is bash (4.4 or newer), zsh or fish.
    """
    text = script(click.get_current_context().find_root().command, shell)
    if not install:
        click.echo(text, nl=False)
        return
    from qaflora_edge.errors import OutputFileError, os_errors
    from qaflora_edge.files import write_text_atomic

    path = script_path(shell)
    failure = f"Cannot write {path}: making the folder {path.parent} failed"
    advice = f"Print it with `qaflora completion {shell}` and put it elsewhere."
    with os_errors(OutputFileError, failure, advice):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(path, text)
    click.echo(f"Wrote {path}. {hint(shell, path)}", err=True)
