"""Attack `qaflora serve` from this machine: how long does a user with a key wait beside it?

    python benchmarks/server_attacks.py BUNDLE [--seconds 90] [--only unread]

Options that it does not have go to `qaflora serve`. Clients come from 127.0.0.2, .3 and so on, each
an address of its own to the server; nothing else is asked. Needs Linux.

unread  1,100 connections from five addresses pipeline `GET /` 200 times and read nothing. One that
        is cut, or refused, comes again ten seconds later.
proxied  the same from 127.0.0.1, the address of a proxy, which has no share

A user asks for a chat every second, on a new connection: alone at first, then beside the attack.
Prints a list in JSON. Ends with status 1 where a chat is refused, where the median chat begins more
than --late-s after its usual time, or where the server keeps a connection for more than --held-s.
"""

import argparse
import contextlib
import http.client
import json
import multiprocessing
import os
import select
import socket
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from server_process import started

CHAT = "/v1/chat/completions"
KEY = "a-key-of-the-attacked"
N_USUAL = 10  # chats before an attack
PATIENCE_S = 120.0
AGAIN_S = 10.0
STRANGERS = [f"127.0.0.{number}" for number in range(2, 7)]
PROXY = ["127.0.0.1"]


@dataclass
class Attack:
    """Count what became of the connections of an attack.

    held_s  the longest that one was kept
    """

    n_opened: int = 0
    n_cut: int = 0
    held_s: float = 0.0


class Crowd:
    """Hold connections that send what they have, and read nothing."""

    def __init__(self, port: int, data: bytes, n_connection: int, addresses: Sequence[str]) -> None:
        self._port = port
        self._addresses = addresses
        self._data = data
        self._poll = select.epoll()
        self._clients: dict[int, socket.socket] = {}
        self._opened_s: dict[int, float] = {}
        self._rest: dict[int, bytes] = {}
        self._next_s = deque([0.0] * n_connection)  # when those that are not there come
        self.attack = Attack()

    def run(self, until_s: float) -> None:
        while time.monotonic() < until_s:
            for _ in range(50):  # a burst that the server can accept
                if self._next_s and self._next_s[0] <= time.monotonic():
                    self._next_s.popleft()
                    self._open()
            for number, event in self._poll.poll(0.05):
                self._go_on(number, event)
        for number in [*self._clients]:
            self._close(number)

    def _open(self) -> None:
        client = socket.socket()
        client.setblocking(False)
        address = self._addresses[self.attack.n_opened % len(self._addresses)]
        client.bind((address, 0))
        with contextlib.suppress(BlockingIOError):
            client.connect(("127.0.0.1", self._port))
        number = client.fileno()
        self._clients[number] = client
        self._opened_s[number] = time.monotonic()
        self._rest[number] = self._data
        self._poll.register(number, select.EPOLLOUT)
        self.attack.n_opened += 1

    def _go_on(self, number: int, event: int) -> None:
        if event & (select.EPOLLHUP | select.EPOLLERR):
            self.attack.n_cut += 1
            self._close(number)
            return
        try:
            n_sent = self._clients[number].send(self._rest[number])
        except OSError:
            self._close(number)
            return
        self._rest[number] = self._rest[number][n_sent:]
        if not self._rest[number]:
            self._poll.modify(number, 0)

    def _close(self, number: int) -> None:
        held_s = time.monotonic() - self._opened_s.pop(number)
        self.attack.held_s = max(self.attack.held_s, held_s)
        self._next_s.append(time.monotonic() + AGAIN_S)
        self._poll.unregister(number)
        self._clients.pop(number).close()


def unread(port: int, addresses: Sequence[str], seconds: float, pipe: Connection) -> None:
    crowd = Crowd(port, 200 * b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", 1100, addresses)
    crowd.run(time.monotonic() + seconds)
    pipe.send(crowd.attack)


ATTACKS = {"unread": (unread, STRANGERS), "proxied": (unread, PROXY)}


def first_event_s(port: int) -> float:
    """Return the seconds until a chat begins. Raises OSError where it is refused."""
    body = {"messages": [{"role": "user", "content": "the cat"}], "max_tokens": 2, "stream": True}
    headers = {"Authorization": f"Bearer {KEY}"}
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    start_s = time.monotonic()
    with contextlib.closing(client):
        client.request("POST", CHAT, json.dumps(body), headers)
        response = client.getresponse()
        if response.status != 200:
            raise OSError(f"status {response.status}")
        response.readline()
        seconds = time.monotonic() - start_s
        response.read()
    return seconds


@dataclass
class Outcome:
    """Say how chats went beside an attack; times are seconds until they began.

    server_cpu_s  processor time that the server used meanwhile, chats included
    """

    attack: str
    usual_s: float
    usual_longest_s: float
    median_s: float
    longest_s: float
    n_chat: int
    errors: list[str]
    server_cpu_s: float
    crowd: Attack


def cpu_s(pid: int) -> float:
    """Return the processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    user, system = fields[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def outcome_of(name: str, server: int, port: int, seconds: float) -> Outcome:
    usual = [first_event_s(port) for _ in range(N_USUAL)]
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    attack, addresses = ATTACKS[name]
    attacker = context.Process(target=attack, args=(port, addresses, seconds, there))
    before_s = cpu_s(server)
    attacker.start()
    times: list[float] = []
    errors: list[str] = []
    while attacker.is_alive() and not here.poll():
        try:
            times.append(first_event_s(port))
        except (OSError, http.client.HTTPException) as error:
            errors.append(repr(error))
        time.sleep(1)
    crowd: Attack = here.recv()
    attacker.join()
    server_cpu_s = round(cpu_s(server) - before_s, 2)
    return Outcome(
        attack=name,
        usual_s=round(statistics.median(usual), 3),
        usual_longest_s=round(max(usual), 3),
        median_s=round(statistics.median(times or [PATIENCE_S]), 3),
        longest_s=round(max(times, default=PATIENCE_S), 3),
        n_chat=len(times),
        errors=errors[:5] + [f"{len(errors)} in all"] * bool(errors),
        server_cpu_s=server_cpu_s,
        crowd=crowd,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", metavar="BUNDLE")
    parser.add_argument("--seconds", type=float, default=90, help="of each attack")
    parser.add_argument("--only", choices=ATTACKS, action="append")
    parser.add_argument("--late-s", type=float, default=1.0)
    parser.add_argument("--held-s", type=float, default=65.0)
    options, of_serve = parser.parse_known_args()
    os.environ["QAFLORA_API_KEY"] = KEY
    command = [sys.executable, "-P", "-m", "qaflora_edge", "serve", options.bundle, *of_serve]
    outcomes = []
    with (
        tempfile.TemporaryDirectory(prefix="qaflora-attacks-") as folder,
        started(command, Path(folder) / "log") as (server, port),
    ):
        for name in options.only or ATTACKS:
            outcomes.append(outcome_of(name, server.pid, port, options.seconds))
    print(json.dumps([asdict(outcome) for outcome in outcomes], indent=1))
    is_late = any(each.median_s > each.usual_s + options.late_s for each in outcomes)
    is_held = any(each.crowd.held_s > options.held_s for each in outcomes)
    sys.exit(is_late or is_held or any(each.errors for each in outcomes))


if __name__ == "__main__":
    main()
