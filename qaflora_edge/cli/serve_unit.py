"""`qaflora serve --print-systemd`: the same command as a unit of a user."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import click
from click.core import ParameterSource

from qaflora_edge.server.options import DRAIN_S

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
