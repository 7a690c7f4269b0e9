"""A server as a process, from its start to its end, for the measurements beside this file."""

import contextlib
import http.client
import json
import re
import shlex
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

START_S = 600.0  # the longest that it may load
ANSWER_S = 60.0  # the longest that it may take to say whether it has


@contextlib.contextmanager
def started(command: list[str], log: Path) -> Iterator[tuple["subprocess.Popen[bytes]", int]]:
    """The process and the port of a server that answers GET /health with 200.

    command  without --port; what it writes goes to log

    Raises SystemExit with what it said when it ends, says that it failed, or loads for too long.
    """
    port = _free_port()
    whole = [*command, "--port", str(port)]
    with log.open("wb") as file, subprocess.Popen(whole, stdout=file, stderr=file) as process:
        try:
            until = time.monotonic() + START_S
            while (said := _health(port)) != "ok":
                if process.poll() is not None:
                    said = f"it ended with status {process.returncode}"
                elif said == "loading" and time.monotonic() < until:
                    time.sleep(0.1)
                    continue
                end = log.read_text(encoding="utf-8", errors="replace")[-2000:]
                raise SystemExit(f"{shlex.join(whole)} does not start: {said}; its log:\n{end}")
            yield process, port
        finally:
            process.terminate()


def _health(port: int) -> str:
    """ "ok", "loading", or what a server says of itself.

    With status 503 both servers say that they load, and `qaflora serve` too that it could not.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER_S)
    with contextlib.closing(connection):
        try:
            connection.request("GET", "/health")
            response = connection.getresponse()
            body = response.read()
        except ConnectionRefusedError:
            return "loading"
    if response.status == 200:
        return "ok"
    if response.status == 503 and json.loads(body).get("status") != "error":
        return "loading"
    return f"GET /health is answered with {response.status} {body[:500].decode()}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def status_bytes(field: str, pid: int | str = "self") -> int | None:
    """A size in Linux's account of a process; unlike ru_maxrss it knows no parent's peak."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    match = re.search(rf"^{field}:\s+(\d+) kB$", text, re.M)
    return 1024 * int(match[1]) if match else None
