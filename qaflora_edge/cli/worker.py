"""qaflora worker"""

import ipaddress
import signal

import click

from qaflora_edge.cli.options import command, own_options
from qaflora_edge.errors import WorkerError
from qaflora_edge.files import make_folder
from qaflora_edge.settings import expanded


@command(
    "qaflora worker",
    "qaflora worker --port 50053 --cache ~/.cache/qaflora-worker",
    "qaflora run demo --rpc 127.0.0.1:50052,127.0.0.1:50053 'Hello'",
)
@own_options
def worker(host: str, port: int, cache: str | None, threads: int | None, insecure: bool) -> None:
    """Lend this machine's memory to a base that does not fit another.

    It computes layers for one client at a time, which names it with --rpc; both must be of the
    same build. It is llama.cpp's RPC server: its protocol has no password and no encryption. From
    other machines reach it through a tunnel, or say --insecure in a network of your own. Ctrl-C
    ends it.
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
    from qaflora_edge.backend.context import default_threads
    from qaflora_edge.backend.devices import serve

    for number in (signal.SIGINT, signal.SIGTERM):  # no handler of Python runs meanwhile
        signal.signal(number, signal.SIG_DFL)
    serve(host, port, cache=folder, threads=threads or default_threads())
    raise WorkerError(
        f"The worker cannot listen on {host}:{port}: the port is in use, or the address is none of "
        "this machine's. Choose another one with --port or --host."
    )
