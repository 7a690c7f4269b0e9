"""qaflora serve, and `--print-systemd`: the same command as a unit of a user"""

from __future__ import annotations

import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import click
from click.core import ParameterSource

from qaflora_edge.cli.options import (
    BUNDLE,
    SharedOptions,
    bundle_folder,
    command,
    own_options,
    shared_options,
)
from qaflora_edge.errors import OptionError
from qaflora_edge.server.options import DRAIN_S

KEY_RULE = "8 or more printable ASCII characters without spaces"


@command(
    "qaflora serve models/demo",
    "qaflora serve models/demo models/other --parallel 8 --port 8000",
    "QAFLORA_API_KEY=... qaflora serve models/demo --host 0.0.0.0",
)
@click.argument("bundles", nargs=-1, required=True, **BUNDLE)
@click.option(
    "--print-systemd",
    is_flag=True,
    help="Print a systemd unit that serves so for a user, with limits, and serve nothing.",
)
@own_options
@shared_options
@click.pass_context
def serve(
    ctx: click.Context,
    /,
    bundles: tuple[str, ...],
    print_systemd: bool,
    host: str,
    port: int,
    api_key: str | None,
    max_queue: int,
    timeout: float,
    cors_origin: tuple[str, ...],
    allow_host: tuple[str, ...],
    insecure: bool,
    log_prompts: bool,
    options: SharedOptions,
) -> None:
    """Serve bundles to programs and browsers that speak OpenAI's API.

    Each DIR is a model by its name, and NAME:STRATEGY for each strategy that it can follow; GET
    /v1/models lists them. Beyond this machine (--host) an API key is needed, or --insecure. The
    options of sampling hold for requests that say nothing. Ctrl-C or SIGTERM ends what runs
    first; a second one ends at once.
    """
    try:
        from qaflora_edge.server.options import ServerOptions
        from qaflora_edge.server.run import run
        from qaflora_edge.server.security import LOCAL_NAMES, is_loopback
    except ModuleNotFoundError as error:
        package, _, _ = (error.name or "").partition(".")
        raise OptionError(
            f"qaflora serve needs the package {package}, which is not installed, expected "
            "those of the extra `server`; install them with: pip install 'qaflora-edge[server]'."
        ) from error
    if not is_loopback(host) and api_key is None and not insecure:
        raise click.UsageError(
            f"--host {host} can be reached from other machines, and there is no API key. Set "
            "QAFLORA_API_KEY, or say --insecure if everyone may use it."
        )
    _check_key(api_key)
    if print_systemd:
        click.echo(unit([bundle_folder(bundle) for bundle in bundles], ctx))
        return
    names = LOCAL_NAMES | {socket.gethostname().lower(), host.lower(), *map(str.lower, allow_host)}
    is_open = api_key is not None and not is_loopback(host)
    run(
        [bundle_folder(bundle) for bundle in bundles],
        host,
        port,
        ServerOptions(
            api_key=api_key,
            cors_origins=cors_origin,
            hosts=None if is_open or "*" in allow_host else frozenset(names),
            max_queue=max_queue,
            timeout_s=timeout,
            logs_prompts=log_prompts,
            engine={"strategy": options.strategy, **options.engine},
            sampling=options.sampling,
            raw_prompt=options.raw_prompt,
        ),
    )


def _check_key(api_key: str | None) -> None:
    is_printable = api_key is None or all("!" <= character <= "~" for character in api_key)
    if api_key is not None and (len(api_key) < 8 or not is_printable):
        raise OptionError(
            f"The API key has {len(api_key)} characters, expected {KEY_RULE}; choose another one "
            "(--api-key, QAFLORA_API_KEY)."
        )


ENV_FILE = "%h/.config/qaflora-edge/serve.env"
# Options that the unit has in another place, or that are not for it.
_LEFT_OUT = ("bundles", "print_systemd", "api_key")

_UNIT = """\
# Save it as ~/.config/systemd/user/qaflora.service, then:
#   systemctl --user daemon-reload
#   systemctl --user enable --now qaflora
# An API key belongs into {env_file}, which only you may read, as QAFLORA_API_KEY=...
# ({home} stands for your home.) `loginctl enable-linger` lets it run while you are not logged in.
[Unit]
Description=qaflora serve {names}
After=network.target

[Service]
ExecStart={command}
EnvironmentFile=-{env_file}
Restart=on-failure
RestartSec=5
TimeoutStopSec={stop_s:.0f}
MemoryMax=80%
TasksMax=512
LimitNOFILE=8192
NoNewPrivileges=yes
UMask=0077

[Install]
WantedBy=default.target"""


def unit(folders: Sequence[Path], ctx: click.Context) -> str:
    """The text of the unit.

    folders  of the bundles
    ctx      of the command, whose options of the command line are those of the unit
    """
    words = [sys.executable, "-m", "qaflora_edge", "serve"]
    words += [str(folder.absolute()) for folder in folders]
    return _UNIT.format(
        command=" ".join(map(_quoted, [*words, *_options(ctx)])),
        env_file=ENV_FILE,
        home="%h",
        names=", ".join(folder.name for folder in folders).replace("%", "%%"),
        stop_s=DRAIN_S + 10,
    )


def _options(ctx: click.Context) -> list[str]:
    """The options that were typed, as words."""
    words = []
    for param in ctx.command.params:
        name = param.name or ""
        is_typed = ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE
        if not isinstance(param, click.Option) or name in _LEFT_OUT or not is_typed:
            continue
        value = ctx.params[name]
        if param.is_flag:
            words.append((param.opts if value else param.secondary_opts)[0])
            continue
        for each in value if param.multiple else [value]:
            words += [param.opts[0], str(each)]
    return words


def _quoted(word: str) -> str:
    """A word as systemd.service(5) reads it."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    escaped = escaped.replace("%", "%%").replace("$", "$$")
    is_plain = word and all(character.isalnum() or character in "-_./:=,@+" for character in word)
    return escaped if is_plain else f'"{escaped}"'
