"""What may go wrong while a server listens: clients, files and requests that fail."""

import contextlib
import http.client
import itertools
import json
import select
import socket
import struct
from functools import partial
from typing import Any

import httpx2 as httpx
import pytest
from bundles import TinyBundle, make_bundle
from patience import PATIENCE_S, wait_until
from serving import ENGINE, address_of, listening, listening_app, make_options, metric
from tiny import USER, constant_logits

from qaflora_edge.dialects.options import FIXED
from qaflora_edge.server import receive, run, security
from qaflora_edge.server.app import make_app
from qaflora_edge.server.run import MAX_HEAD_BYTES, allow_files

CHAT = "/v1/chat/completions"
KEY = "a-key-of-the-tests"
LONG_CTX = 16384


@pytest.fixture(scope="module")
def endless(tmp_path_factory) -> TinyBundle:
    """A base that writes an `a` after the other: answers of minutes, unless they are ended."""
    replace = constant_logits(lambda token: 9.0 if token == "a" else 0.0)
    place = tmp_path_factory.mktemp("endless")
    return make_bundle(place, arch="qwen2", replace=replace, n_ctx=LONG_CTX)


def ask(url: str, **more: Any) -> str:
    """The text of an answer that needs nothing else."""
    body = {"messages": USER, "max_tokens": 9, "temperature": 0, **more}
    headers = {"Authorization": f"Bearer {KEY}"}
    found = httpx.post(url + CHAT, json=body, headers=headers, timeout=PATIENCE_S)
    return found.json()["choices"][0]["message"]["content"]


def raw_post(data: bytes, n_declared: int | None = None, path: str = CHAT) -> bytes:
    """A request as bytes; the length that it declares may be another than it has."""
    n = len(data) if n_declared is None else n_declared
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {n}\r\n\r\n"
    return head.encode() + data


def connected(stack: contextlib.ExitStack, url: str, data: bytes = b"") -> socket.socket:
    """A client that has sent this, and stays until the stack is closed."""
    client = stack.enter_context(socket.create_connection(address_of(url), PATIENCE_S))
    client.sendall(data)
    return client


def peeked(client: socket.socket) -> bytes:
    """What is there to be read, and stays so."""
    # By select: a socket with a time limit waits whatever flags its recv is given.
    is_there = select.select([client], [], [], 0)[0]
    return client.recv(65536, socket.MSG_PEEK) if is_there else b""


@pytest.mark.slow
def test_clients_that_vanish_are_no_longer_computed_for(endless) -> None:
    """In the middle of a stream, before its first byte, and while they wait; by FIN and by RST."""
    app = make_app([endless.folder], make_options(engine={**ENGINE, "n_ctx": LONG_CTX}))
    asked = {"model": "tiny", "messages": USER, "stream": True}

    with listening_app(app) as url, contextlib.ExitStack() as stack:
        running = app.state.running
        opened = []
        for number in range(10):
            body = json.dumps(asked | {"stream": number % 3 > 0})
            opened.append(connected(stack, url, raw_post(body.encode())))
        wait_until(lambda: len(running) == len(opened))
        # Of the four that have a turn any three are decoded.
        wait_until(lambda: any(b'"content"' in peeked(client) for client in opened[1:3]))
        for number, client in enumerate(opened):
            if number % 2:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()
        wait_until(lambda: metric(url, "qaflora_requests_total", CHAT) == len(opened))
        assert (running, app.state.models.queue.waiting.total()) == (set(), 0)
        assert metric(url, "qaflora_completion_tokens_total") < LONG_CTX / 2  # not one to its end
        assert ask(url, max_tokens=3) == "aaa"


@pytest.mark.slow
def test_a_client_that_reads_nothing_is_given_up(endless, monkeypatch) -> None:
    """Its answer is no longer computed, and others have its turn."""
    monkeypatch.setattr(run, "READ_S", 0.5)
    app = make_app([endless.folder], make_options(engine={**ENGINE, "n_ctx": LONG_CTX}))
    asked = {"model": "tiny", "messages": USER, "stream": True}
    wordy = {"logprobs": True, "top_logprobs": 20, "n": 16}
    with listening_app(app, send_buffer=1 << 16) as url, contextlib.ExitStack() as stack:
        client = stack.enter_context(socket.socket())
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(address_of(url))
        client.sendall(raw_post(json.dumps(asked | wordy).encode()))
        wait_until(lambda: len(app.state.running) == 1)
        wait_until(lambda: not app.state.running)
        client.settimeout(PATIENCE_S)
        data = b""
        with contextlib.suppress(ConnectionError):
            while part := client.recv(65536):
                data += part
        assert data.startswith(b"HTTP/1.1 200 ")
        assert b"[DONE]" not in data
        monkeypatch.setattr(run, "READ_S", PATIENCE_S)
        assert ask(url, max_tokens=3) == "aaa"


def test_lost_bodies_hold_no_turn(made, monkeypatch) -> None:
    monkeypatch.setattr(receive, "BODY_S", 3.0)
    with listening(made.folder, max_queue=0) as url, contextlib.ExitStack() as stack:
        clients = [connected(stack, url, raw_post(b'{"messages"', 99)) for _ in range(20)]
        assert ask(url, max_tokens=1)
        for client in clients:
            assert client.recv(12) == b"HTTP/1.1 408"


START = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"
NEXT = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.mark.parametrize(
    "data",
    [
        START + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + NEXT,
        START.replace(b"\r", b"") + b"\n" + NEXT,
        START + b"X: a\nY: b\r\n\r\n" + NEXT,
        START + b"X: a\r\n" * 12_000 + b"\r\n" + NEXT,
        NEXT[:-2] + b"X: a\n\n" + NEXT,
        START + CHUNKED + b"xyz\r\n" + NEXT,
        b"GET /" + b"a" * MAX_HEAD_BYTES,
        START + b"X: " + b"a" * MAX_HEAD_BYTES,
        START + CHUNKED + b"0\r\nX: " + b"a" * 2 * MAX_HEAD_BYTES,
    ],
    ids=[
        *("two lengths", "LF", "a bare LF", "long at once", "an LF at the end", "no chunk"),
        *("a line without end", "a header without end", "a trailer without end"),
    ],
)
def test_what_a_proxy_may_read_otherwise_is_refused(made, data) -> None:
    with listening(made.folder) as url, socket.create_connection(address_of(url)) as client:
        client.settimeout(PATIENCE_S)
        client.sendall(data)
        answer = b""
        with contextlib.suppress(ConnectionResetError):  # not all of it was read
            while part := client.recv(65536):
                answer += part
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"HTTP/1.1 200 " not in answer
    assert b"expected HTTP/1.1 with lines that end in CR LF" in answer


def test_a_thousand_silent_connections_keep_nobody_out(made, monkeypatch) -> None:
    monkeypatch.setattr(run, "HEAD_S", 5.0)
    allow_files(4096)
    with listening(made.folder) as url, contextlib.ExitStack() as stack:
        clients = []
        for number in range(run.MAX_CONNECTIONS):
            clients.append(connected(stack, url, NEXT[:30] if number % 2 else b""))
        for _ in range(20):
            assert ask(url, max_tokens=1)
        for client in clients:
            with contextlib.suppress(ConnectionResetError):
                assert client.recv(99) == b""


def test_who_asks_for_nothing_gives_way(made, monkeypatch) -> None:
    monkeypatch.setattr(run, "MAX_CONNECTIONS", 3)
    with listening(made.folder) as url, contextlib.ExitStack() as stack:
        connect = partial(connected, stack, url)
        kept = connect(NEXT)
        assert kept.recv(65536).startswith(b"HTTP/1.1 200 ")

        def begin() -> None:
            half = raw_post(b"", 9).replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n")
            assert connect(half).recv(65536).startswith(b"HTTP/1.1 100 ")

        begin()
        silent = connect()
        asks = connect(NEXT)
        assert kept.recv(1) == b""  # it has asked for nothing for the longest
        assert asks.recv(65536).startswith(b"HTTP/1.1 200 ")
        begin()
        assert silent.recv(1) == b""
        begin()
        assert asks.recv(1) == b""
        refused = connect().recv(65536)
    assert refused.startswith(b"HTTP/1.1 503 ")
    assert b"Retry-After: 2\r\n" in refused
    assert b"The server has too many connections; try again later." in refused


PAGES = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 200
LAST_PAGE = b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
SMALL_BUFFER = 1 << 14


def unread(stack: contextlib.ExitStack, url: str, data: bytes = PAGES) -> socket.socket:
    """A client that has sent this, and reads nothing though the answers fill its buffer."""
    client = stack.enter_context(socket.socket())
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER)
    client.settimeout(PATIENCE_S)
    client.connect(address_of(url))
    client.sendall(data)
    assert client.recv(1, socket.MSG_PEEK) == b"H"
    return client


def is_cut(client: socket.socket) -> bool:
    """Whether the server has ended a connection, nothing of which is read here."""
    return client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) != 0


@pytest.mark.parametrize("data", [PAGES, LAST_PAGE], ids=["many", "the last"])
def test_who_reads_nothing_is_cut_whatever_it_asks(made, monkeypatch, data) -> None:
    monkeypatch.setattr(run, "READ_S", 0.5)
    app = make_app([made.folder], make_options())
    with (
        listening_app(app, send_buffer=SMALL_BUFFER) as url,
        contextlib.ExitStack() as stack,
    ):
        client = unread(stack, url, data)
        wait_until(partial(is_cut, client))


def test_who_reads_nothing_gives_way(made, monkeypatch) -> None:
    monkeypatch.setattr(run, "MAX_CONNECTIONS", 3)
    app = make_app([made.folder], make_options(api_key=KEY))
    with (
        listening_app(app, send_buffer=SMALL_BUFFER) as url,
        contextlib.ExitStack() as stack,
    ):
        clients = [unread(stack, url) for _ in range(3)]
        assert ask(url, max_tokens=1)
        assert [is_cut(client) for client in clients] == [True, False, False]


def test_an_address_has_a_share_of_the_connections(made, monkeypatch) -> None:
    monkeypatch.setattr(run, "MAX_CONNECTIONS", 2 * run.CONNECTION_SHARE)
    monkeypatch.setattr(security, "OWN_ADDRESSES", frozenset[str]())
    app = make_app([made.folder], make_options())
    with (
        listening_app(app, send_buffer=SMALL_BUFFER) as url,
        contextlib.ExitStack() as stack,
    ):
        clients = [unread(stack, url) for _ in range(2)]
        assert connected(stack, url).recv(65536).startswith(b"HTTP/1.1 503 ")
        assert not any(map(is_cut, clients))


def test_pipelined_requests_are_answered_in_order(made) -> None:
    with listening(made.folder) as url, contextlib.ExitStack() as stack:
        client = connected(stack, url, PAGES[: len(PAGES) // 20] + LAST_PAGE)
        data = b""
        while part := client.recv(65536):
            data += part
    assert data.count(b"HTTP/1.1 200 ") == data.count(b"</html>") == 11


VALUES = (True, False, 0, 7, "", "low", [], ["x"], {}, {"a": 1}, None)


def test_a_refused_option_is_a_400_and_the_connection_stays(made) -> None:
    with listening(made.folder) as url:
        client = http.client.HTTPConnection(*address_of(url), timeout=PATIENCE_S)
        client.connect()
        socket_before = client.sock
        for path, asked in ((CHAT, {"messages": USER}), ("/v1/completions", {"prompt": "a"})):
            for name, value in itertools.product(FIXED, VALUES):
                client.request("POST", path, json.dumps({**asked, "max_tokens": 1, name: value}))
                response = client.getresponse()
                answer = json.loads(response.read())
                assert response.status in (200, 400), (path, name, value)
                assert response.status == 200 or answer["error"]["param"] == name
                assert client.sock is socket_before, (path, name, value)
        client.close()
        assert metric(url, "qaflora_requests_total", 'status="400"') > 0
        assert metric(url, "qaflora_requests_total", 'status="500"') == 0
