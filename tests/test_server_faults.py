"""What may go wrong while a server listens: clients, files and requests that fail."""

import contextlib
import json
import select
import socket
import struct
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest
from bundles import TinyBundle, make_bundle
from patience import PATIENCE_S, wait_until
from serving import ENGINE, listening, listening_app, make_options, metric
from tiny import constant_logits

from qaflora_edge import Engine
from qaflora_edge.server import requests, stream
from qaflora_edge.server.app import make_app
from qaflora_edge.server.run import MAX_HEAD_BYTES

CHAT = "/v1/chat/completions"
KEY = "a-key-of-the-tests"
LONG_CTX = 16384
USER = [{"role": "user", "content": "the thing?"}]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> TinyBundle:
    return make_bundle(tmp_path_factory.mktemp("faults"), calibrate=True)


@pytest.fixture(scope="module")
def alone(made: TinyBundle) -> Iterator[Engine]:
    """The oracle."""
    with Engine(made.folder, **ENGINE) as engine:  # type: ignore[arg-type]
        yield engine


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> TinyBundle:
    """A base that writes an `a` after the other: answers of minutes, unless they are ended."""
    replace = constant_logits(lambda token: 9.0 if token == "a" else 0.0)
    return make_bundle(
        tmp_path_factory.mktemp("endless"), arch="qwen2", replace=replace, n_ctx=LONG_CTX
    )


def body_of(number: int, **more: Any) -> dict[str, Any]:
    """One of many requests that differ in prompt, seed and strategy."""
    model = ("tiny", "tiny:calibrated", "tiny:single:es", "tiny:static", "tiny:base")[number % 5]
    text = "the king " * (1 + number % 7) + str(number)
    return {
        "model": model,
        "messages": [{"role": "user", "content": text}],
        "seed": number,
        "temperature": 1.5,
        "max_tokens": 16 + number % 9,
        "fusion": {"return": "layers"},
        **more,
    }


def assert_alone(found: dict[str, Any], number: int, alone: Engine) -> None:
    """An answer to `body_of` is what an Engine that has nothing else to do gives."""
    asked = body_of(number)
    options = {key: asked[key] for key in ("seed", "temperature", "max_tokens")}
    strategy = asked["model"].partition(":")[2] or None
    weights = alone.weights(alone.chat_tokens(asked["messages"]), strategy=strategy)
    layers = found["fusion"]["layers"]
    assert np.array_equal(np.float32([layers[name] for name in weights.adapters]), weights.weights)
    expected = alone.chat(asked["messages"], weights=strategy, **options)
    assert found["choices"] == expected["choices"]
    assert found["usage"] == expected["usage"]


def address_of(url: str) -> tuple[str, int]:
    found = httpx.URL(url)
    assert found.port is not None
    return found.host, found.port


def raw_post(data: bytes, n_declared: int | None = None, path: str = CHAT) -> bytes:
    """A request as bytes; the length that it declares may be another than it has."""
    n = len(data) if n_declared is None else n_declared
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {n}\r\n\r\n"
    return head.encode() + data


def receive_until(client: socket.socket, sign: bytes) -> bytes:
    data = b""
    while sign not in data:
        part = client.recv(65536)
        assert part, f"the server has closed the connection after {data[:400]!r}"
        data += part
    return data


def peeked(client: socket.socket) -> bytes:
    """What is there to be read, and stays so."""
    # By select: a socket with a time limit waits whatever flags its recv is given.
    is_there = select.select([client], [], [], 0)[0]
    return client.recv(65536, socket.MSG_PEEK) if is_there else b""


@pytest.mark.slow
def test_clients_that_vanish_are_no_longer_computed_for(endless: TinyBundle) -> None:
    """In the middle of a stream, before its first byte, and while they wait; by FIN and by RST."""
    app = make_app([endless.folder], make_options(engine={**ENGINE, "n_ctx": LONG_CTX}))
    asked = {"model": "tiny", "messages": USER, "stream": True}

    with listening_app(app) as url, contextlib.ExitStack() as stack:
        running = app.state.running
        opened = []
        for number in range(10):
            client = stack.enter_context(socket.create_connection(address_of(url), PATIENCE_S))
            is_stream = number % 3 > 0
            client.sendall(raw_post(json.dumps(asked | {"stream": is_stream}).encode()))
            opened.append(client)
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
        body = {**asked, "stream": False, "max_tokens": 3}
        short = httpx.post(url + CHAT, json=body, timeout=PATIENCE_S)
        assert short.json()["choices"][0]["message"]["content"] == "aaa"


@pytest.mark.slow
def test_a_client_that_reads_nothing_is_given_up(
    endless: TinyBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its answer is no longer computed, and others have its turn."""
    monkeypatch.setattr(stream, "SEND_S", 0.5)
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
        monkeypatch.setattr(stream, "SEND_S", PATIENCE_S)
        short = httpx.post(url + CHAT, json={**asked, "stream": False, "max_tokens": 3})
        assert short.json()["choices"][0]["message"]["content"] == "aaa"


@pytest.mark.slow
def test_bodies_that_come_slowly_or_never(
    made: TinyBundle, alone: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They hold no turn, and are not waited for without end; others are answered meanwhile."""
    monkeypatch.setattr(requests, "BODY_S", 3.0)
    data = json.dumps(body_of(0)).encode()
    with listening(made.folder, max_queue=0) as url, contextlib.ExitStack() as stack:

        def connect() -> socket.socket:
            return stack.enter_context(socket.create_connection(address_of(url), PATIENCE_S))

        clients = [connect() for _ in range(20)]
        for client in clients:
            client.sendall(raw_post(data)[: -len(data) // 2])
        gone = connect()
        gone.sendall(raw_post(data[:40], len(data)))
        gone.close()
        slow = connect()
        for byte in raw_post(data)[:5]:
            slow.sendall(bytes([byte]))
            answer = httpx.post(url + CHAT, json=body_of(1), timeout=PATIENCE_S)
            assert_alone(answer.json(), 1, alone)
        slow.sendall(raw_post(data)[5:])
        assert slow.recv(65536).startswith(b"HTTP/1.1 200 ")
        for client in clients:
            late = read_response(client)
            assert late.status_code == 408
            assert late.json()["error"]["message"] == "The body has not come within 3 s."


def is_closed(client: socket.socket) -> bool:
    """Whether the other side has ended a connection, after whatever it has answered."""
    try:
        while client.recv(65536):
            pass
    except ConnectionError:
        pass
    return True


def test_heads_without_end(made: TinyBundle, alone: Engine) -> None:
    """What belongs to no body is bounded, long before anybody's key was seen."""
    n = 2 * MAX_HEAD_BYTES
    start = b"POST / HTTP/1.1\r\nHost: localhost\r\n"
    chunked = b"Transfer-Encoding: chunked\r\n\r\n0\r\n"
    unending = (
        b"GET /" + b"a" * n,
        start + b"X: " + b"a" * n,
        start + b"x" * n,
        start + b"X: a\r\n" * (n // 6),
        start + chunked + b"X: " + b"a" * n,
    )
    with listening(made.folder, api_key=KEY) as url, contextlib.ExitStack() as stack:
        for data in unending:
            client = stack.enter_context(socket.create_connection(address_of(url), PATIENCE_S))
            with contextlib.suppress(ConnectionError):
                client.sendall(data)
            assert is_closed(client)
        headers = {"Authorization": f"Bearer {KEY}"}
        body = {**body_of(3), "unknown": "a" * 1_000_000}
        found = httpx.post(url + CHAT, json=body, headers=headers, timeout=PATIENCE_S)
        assert_alone(found.json(), 3, alone)


def read_response(client: socket.socket) -> httpx.Response:
    """One whole response with a length, from a socket."""
    head, _, content = receive_until(client, b"\r\n\r\n").partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    while len(content) < int(headers["content-length"]):
        part = client.recv(65536)
        assert part
        content += part
    return httpx.Response(int(status.split()[1]), headers=headers, content=content)
