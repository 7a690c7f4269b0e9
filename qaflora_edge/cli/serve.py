"""qaflora serve and worker: bundles over HTTP in OpenAI's shape, and memory for another machine"""

import ipaddress
import re
import signal
import socket

import click

from qaflora_edge.cli import options as cli
from qaflora_edge.cli.places import bundle_folder
from qaflora_edge.config import expanded
from qaflora_edge.errors import OptionError, WorkerError
from qaflora_edge.files import make_folder, what_is_at


@cli.command(
    "qaflora serve demo",
    "qaflora serve demo models/other --parallel 8 --port 8000",
    "QAFLORA_API_KEY=... qaflora serve demo --host 0.0.0.0",
)
@click.argument("bundles", nargs=-1, required=True, **cli.BUNDLE | {"metavar": "DIR..."})
@cli.own_options
@cli.shared_options
def serve(
    bundles: tuple[str, ...],
    host: str,
    port: int,
    api_key: str | None,
    max_queue: int,
    max_models: int | None,
    timeout: float,
    ttl: float | None,
    cors_origin: tuple[str, ...],
    allow_adapters: str | None,
    allow_host: tuple[str, ...],
    teach: bool | None,
    insecure: bool,
    options: cli.SharedOptions,
) -> None:
    """Serve bundles to programs and browsers that speak OpenAI's API.

    Each DIR is a model by its name, and NAME:STRATEGY weighs by another strategy. Beyond this
    machine (--host) an API key is needed, or --insecure. The options of sampling hold for requests
    that say nothing. Ctrl-C or SIGTERM lets running answers end; a second one ends at once.
    """
    try:
        from qaflora_edge.server.run import run
        from qaflora_edge.server.security import LOCAL_NAMES, is_loopback
        from qaflora_edge.server.served_models import ServerOptions
    except ImportError as error:  # not installed, or broken
        raise OptionError(
            f"qaflora serve cannot load a package: {error}; expected those of the extra "
            "`server`. Install them with: pip install 'qaflora-edge[server]'."
        ) from error
    if not is_loopback(host) and api_key is None and not insecure:
        raise click.UsageError(
            f"--host {host} can be reached from other machines, and there is no API key. Set "
            "QAFLORA_API_KEY, or say --insecure if everyone may use it."
        )
    is_private = is_loopback(host) and not allow_host  # a proxy's name lets others in
    if teach and api_key is None and not is_private:
        raise click.UsageError(
            "--teach lets whoever reaches the server change who answers all, so it needs an API "
            "key. Set QAFLORA_API_KEY."
        )
    if api_key is not None and not re.fullmatch("[!-~]{8,}", api_key):
        raise OptionError(
            f"The API key has {len(api_key)} characters, expected 8 or more printable ASCII "
            "characters without spaces; choose another one (--api-key, QAFLORA_API_KEY)."
        )
    folder = expanded(allow_adapters).resolve() if allow_adapters else None
    if folder and not folder.is_dir():
        fault = f"--allow-adapters: {folder} {what_is_at(folder)}"
        raise OptionError(f"{fault}, expected a folder. Make it, or name another.")
    own_names = (socket.gethostname(), host, *allow_host)
    names = LOCAL_NAMES | {name.lower() for name in own_names}
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
            max_models=max_models,
            timeout_s=timeout,
            ttl_s=ttl,
            adapters=folder,
            takes_teaching=is_private if teach is None else teach,
            engine=options.engine,
            sampling=options.sampling,
            chosen=frozenset(filter(cli.is_chosen, vars(options))),
        ),
    )


@cli.command(
    "qaflora worker",
    "qaflora worker --port 50053 --cache ~/.cache/qaflora-worker",
    "qaflora run demo --rpc 127.0.0.1:50052,127.0.0.1:50053 'Hello'",
)
@cli.own_options
def worker(host: str, port: int, cache: str | None, threads: int | None, insecure: bool) -> None:
    """Lend this machine's memory to a base that does not fit another.

    It computes layers for one client at a time, which names it with --rpc; both must be of the
    same build. It is llama.cpp's RPC server: its protocol has no password and no encryption. From
    other machines reach it through a tunnel, or say --insecure in a network of your own.
    """
    try:
        address = ipaddress.IPv4Address(host)
    except ValueError:
        raise click.UsageError(f"--host is {host!r}, expected an IPv4 address.") from None
    if not address.is_loopback and not insecure:
        raise click.UsageError(
            f"--host {host} can be reached from other machines, and the protocol has no password "
            "and no encryption. Listen on 127.0.0.1 and reach it through a tunnel (ssh -L), or say "
            "--insecure if everyone there may use it."
        )
    folder = None if cache is None else expanded(cache)
    if folder is not None:
        make_folder(folder, "--cache")
    from qaflora_edge.backend.devices import serve
    from qaflora_edge.backend.library import default_threads

    for number in (signal.SIGINT, signal.SIGTERM):  # no handler of Python runs meanwhile
        signal.signal(number, signal.SIG_DFL)
    serve(host, port, cache=folder, threads=threads or default_threads())
    raise WorkerError(
        f"The worker cannot listen on {host}:{port}: the port is in use, or the address is none of "
        "this machine's. Choose another one with --port or --host."
    )
