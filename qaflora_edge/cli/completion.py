"""qaflora completion"""

import click
from click.shell_completion import get_completion_class

from qaflora_edge.cli.options import command

SHELLS = ("bash", "zsh", "fish")
VARIABLE = "_QAFLORA_COMPLETE"


@command(
    "qaflora completion bash > ~/.local/share/bash-completion/completions/qaflora",
    "qaflora completion fish > ~/.config/fish/completions/qaflora.fish",
)
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print completion for a shell.

    It completes commands, options, bundles, strategies, and the names of a bundle's adapters and
    of models. SHELL is bash (4.4 or newer), zsh or fish; docs/settings.md says where each looks.
    """
    shell_class = get_completion_class(shell)
    assert shell_class is not None
    root = click.get_current_context().find_root().command
    click.echo(shell_class(root, {}, "qaflora", VARIABLE).source(), nl=False)
