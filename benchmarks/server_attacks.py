"""Attack `qaflora serve` from this machine: how long does a user with a key wait beside it?

    python benchmarks/server_attacks.py BUNDLE [--seconds 90] [--only unread]

Options that it does not have go to `qaflora serve`. Clients come from 127.0.0.2, .3 and so on, each
an address of its own to the server; nothing else is asked. Needs Linux.

unread  1,100 connections from five addresses pipeline `GET /` 200 times and read nothing. One that
        is cut, or refused, comes again ten seconds later.
proxied  the same from 127.0.0.1, the address of a proxy, which has no share
bodies  160 connections with a key begin bodies of 4 MB, and send no more than 64 kB
refused  400 connections without a key send 200 requests to a foreign Host at once
refused-proxied  the same from 127.0.0.1, which has no share: all 400 are held together
tokens  8 connections with a key ask for the tokens of 300,000 control tokens

A user asks for a chat every second, on a new connection: alone at first, then beside the attack.
Beside bodies and tokens it asks for the tokens of a text of 20 kB, beside refusals for /health.
Prints a list in JSON. Ends with status 1 where a user is refused, where the median request begins
more than --late-s after its usual time (beside refusals, the last one of all), or where a
connection is kept for more than --held-s.
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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from server_process import started

CHAT = "/v1/chat/completions"
KEY = "a-key-of-the-attacked"
N_USUAL = 10  # requests before an attack
PATIENCE_S = 120.0
AGAIN_S = 10.0
STRANGERS = tuple(f"127.0.0.{number}" for number in range(2, 7))


@dataclass
class Attack:
    """Count what became of the connections of an attack.

    held_s  the longest that one was kept
    """

    n_opened: int = 0
    n_cut: int = 0
    held_s: float = 0.0


def request_bytes(method: str, path: str, body: bytes = b"", n_announced: int = 0) -> bytes:
    head = [f"{method} {path} HTTP/1.1", "Host: localhost", f"Authorization: Bearer {KEY}"]
    head.append(f"Content-Length: {n_announced or len(body)}")
    if n_announced:
        head.append("Connection: close")
    return "\r\n".join([*head, "", ""]).encode() + body


def ask_chat(port: int) -> float:
    """Return the seconds until a chat begins. Raises OSError where it is refused."""
    messages = [{"role": "user", "content": "the cat"}]
    return asked_s(port, CHAT, {"messages": messages, "max_tokens": 2, "stream": True})


def ask_tokens(port: int) -> float:
    """Return the seconds until the tokens of a text are there."""
    return asked_s(port, "/tokenize", {"content": "the cat " * 2_500})


def asked_s(port: int, path: str, body: object) -> float:
    headers = {"Authorization": f"Bearer {KEY}"}
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    start_s = time.monotonic()
    with contextlib.closing(client):
        client.request("POST", path, json.dumps(body), headers)
        response = client.getresponse()
        if response.status != 200:
            raise OSError(f"status {response.status}")
        response.readline()
        seconds = time.monotonic() - start_s
        response.read()
    return seconds


def ask_health(port: int) -> float:
    """Ask whether the server is up, on a new connection; give the seconds."""
    start_s = time.monotonic()
    with contextlib.closing(
        http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    ) as client:
        client.request("GET", "/health")
        status = client.getresponse().status
    if status != 200:
        raise OSError(f"status {status}")
    return time.monotonic() - start_s


@dataclass(frozen=True)
class Plan:
    """Say what an attack sends from which addresses, and what the user asks for beside it."""

    data: bytes
    n_connection: int
    addresses: Sequence[str] = STRANGERS
    ask: Callable[[int], float] = ask_chat


PAGES = 200 * request_bytes("GET", "/")
FOREIGN = 200 * b"GET /v1/models HTTP/1.1\r\nHost: elsewhere.example\r\n\r\n"
SLOW_BODY = request_bytes("POST", "/tokenize", b"a" * 64_000, 4_000_000)
CONTROL_TEXT = json.dumps({"content": "<|im_end|>" * 300_000}).encode()
CONTROL_TOKENS = request_bytes("POST", "/tokenize", CONTROL_TEXT)
PLANS = {
    "unread": Plan(PAGES, 1100),
    "proxied": Plan(PAGES, 1100, addresses=("127.0.0.1",)),
    "bodies": Plan(SLOW_BODY, 160, ask=ask_tokens),
    "refused": Plan(FOREIGN, 400, ask=ask_health),
    "refused-proxied": Plan(FOREIGN, 400, addresses=("127.0.0.1",), ask=ask_health),
    "tokens": Plan(CONTROL_TOKENS, 8, ask=ask_tokens),
}


class Crowd:
    """Hold connections that send what they have, and read nothing."""

    def __init__(self, port: int, plan: Plan) -> None:
        self._port = port
        self._addresses = plan.addresses
        self._data = plan.data
        self._poll = select.epoll()
        self._clients: dict[int, socket.socket] = {}
        self._opened_s: dict[int, float] = {}
        self._rest: dict[int, bytes] = {}
        self._next_s = deque([0.0] * plan.n_connection)  # when those that are not there come
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
        self._poll.register(number, select.EPOLLOUT | select.EPOLLRDHUP)
        self.attack.n_opened += 1

    def _go_on(self, number: int, event: int) -> None:
        if event & (select.EPOLLHUP | select.EPOLLERR | select.EPOLLRDHUP):
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
            self._poll.modify(number, select.EPOLLRDHUP)

    def _close(self, number: int) -> None:
        held_s = time.monotonic() - self._opened_s.pop(number)
        self.attack.held_s = max(self.attack.held_s, held_s)
        self._next_s.append(time.monotonic() + AGAIN_S)
        self._poll.unregister(number)
        self._clients.pop(number).close()


def attack(plan: Plan, port: int, seconds: float, pipe: Connection) -> None:
    crowd = Crowd(port, plan)
    crowd.run(time.monotonic() + seconds)
    pipe.send(crowd.attack)


@dataclass
class Outcome:
    """Say how a user's requests went beside an attack; times are seconds.

    server_cpu_s  processor time that the server used meanwhile, these included
    """

    attack: str
    usual_s: float
    usual_longest_s: float
    median_s: float
    longest_s: float
    n_asked: int
    errors: list[str]
    server_cpu_s: float
    crowd: Attack

    @property
    def waited_s(self) -> float:
        """Give what must not be late: beside refusals each request, else the median."""
        return self.longest_s if self.attack.startswith("refused") else self.median_s


def cpu_s(pid: int) -> float:
    """Return the processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    user, system = fields[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def outcome_of(name: str, server: int, port: int, seconds: float) -> Outcome:
    plan = PLANS[name]
    usual = [plan.ask(port) for _ in range(N_USUAL)]
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    attacker = context.Process(target=attack, args=(plan, port, seconds, there))
    before_s = cpu_s(server)
    attacker.start()
    times: list[float] = []
    errors: list[str] = []
    while attacker.is_alive() and not here.poll():
        try:
            times.append(plan.ask(port))
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
        n_asked=len(times),
        errors=errors[:5] + [f"{len(errors)} in all"] * bool(errors),
        server_cpu_s=server_cpu_s,
        crowd=crowd,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", metavar="BUNDLE")
    parser.add_argument("--seconds", type=float, default=90, help="of each attack")
    parser.add_argument("--only", choices=PLANS, action="append")
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
        for name in options.only or PLANS:
            outcomes.append(outcome_of(name, server.pid, port, options.seconds))
    print(json.dumps([asdict(outcome) for outcome in outcomes], indent=1))
    is_late = any(each.waited_s > each.usual_s + options.late_s for each in outcomes)
    is_held = any(each.crowd.held_s > options.held_s for each in outcomes)
    sys.exit(is_late or is_held or any(each.errors for each in outcomes))


if __name__ == "__main__":
    main()
