"""Waiting: turns, the bounded queue, the end of time, and clients that go away."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest
from bundles import make_bundle
from patience import PATIENCE_S, wait_until
from serving import ENGINE, listening, listening_app, make_options, metric

from qaflora_edge import Engine
from qaflora_edge.backend.context import Context
from qaflora_edge.server import work
from qaflora_edge.server.app import expire_all, make_app
from qaflora_edge.server.options import MAX_LIGHT_CHARS
from qaflora_edge.server.refusals import Refusal
from qaflora_edge.server.turns import Client, Room, Turns, Waiting
from qaflora_edge.weighing.strategy import Probe, Query, Strategy, _registry, register_strategy

N_TURN = int(ENGINE["n_parallel"]) + 1  # type: ignore[call-overload]


# turns alone


def test_clients_take_turns() -> None:
    order: list[str] = []

    async def ask(turns: Turns, address: str, name: str) -> None:
        async with turns.turn(Client(address)):
            order.append(name)
            await asyncio.sleep(0)

    async def play() -> None:
        turns = Turns(1, Room(20))
        async with turns.turn(Client("first")):
            asks = [asyncio.create_task(ask(turns, "busy", f"busy{i}")) for i in range(4)]
            await asyncio.sleep(0)
            asks += [asyncio.create_task(ask(turns, "late", f"late{i}")) for i in range(2)]
            await asyncio.sleep(0)
        await asyncio.gather(*asks)
        assert turns.n_running == 0

    asyncio.run(play())
    assert order == ["busy0", "late0", "busy1", "late1", "busy2", "busy3"]


def test_many_names_are_no_second_share() -> None:
    """Who has a turn has had no more than any other who waits: addresses, and users of one."""
    draw = random.Random(0)
    for _ in range(200):
        waiting = Waiting[int]()
        asked = {
            number: Client(draw.choice("abc"), draw.choice(["", "u", "v", "w"]))
            for number in range(draw.randrange(30))
        }
        for number, client in asked.items():
            waiting.add(client, number)
        for number in draw.sample(list(asked), len(asked) // 3):
            client = asked.pop(number)
            waiting.remove(client, number)
            waiting.remove(client, number)  # once more: it is not there
        of_address, of_user = Counter[str](), Counter[Client]()
        left = dict(asked)
        while (number := waiting.next()) is not None:
            client = left[number]
            addresses = {each.address for each in left.values()}
            users = {each for each in left.values() if each.address == client.address}
            assert of_address[client.address] == min(of_address[each] for each in addresses)
            assert of_user[client] == min(of_user[each] for each in users)
            of_address[client.address] += 1
            of_user[client] += 1
            del left[number]
        assert not left


def test_who_asks_often_keeps_nobody_out() -> None:
    """A full room has a place for an address with fewer, at the cost of the one with the most."""

    async def play() -> dict[str, str]:
        room = Room(4)
        turns = [Turns(1, room), Turns(1, room)]  # of two bundles
        ended: dict[str, str] = {}

        async def ask(which: int, address: str, name: str) -> None:
            try:
                async with turns[which].turn(Client(address, name)):
                    ended[name] = "answered"
            except Refusal as refused:
                ended[name] = refused.code or ""

        async with turns[0].turn(Client("x")), turns[1].turn(Client("x")):
            asks = []
            for i in range(4):
                asks.append(asyncio.create_task(ask(i % 2, "often", f"often{i}")))
            await asyncio.sleep(0)
            for i, address in enumerate(("one", "two", "two", "three", "often")):
                asks.append(asyncio.create_task(ask(i % 2, address, f"{address}{i}")))
            while len(ended) < 5:
                await asyncio.sleep(0)
            assert room.n_waiting == 4
        await asyncio.gather(*asks)
        assert [each.n_running for each in turns] == [0, 0]
        assert room.n_waiting == 0
        return ended

    assert asyncio.run(play()) == {
        "often3": "queue_full",  # for one0
        "often2": "queue_full",  # for two1
        "two2": "queue_full",  # with it two had as many as often
        "often1": "queue_full",  # for three3
        "often4": "queue_full",
        "often0": "answered",
        "one0": "answered",
        "two1": "answered",
        "three3": "answered",
    }


def test_who_gives_up_leaves_no_hole() -> None:
    async def play() -> None:
        room = Room(3)
        turns = Turns(1, room)

        async def ask() -> None:
            async with turns.turn(Client("a")):
                await asyncio.sleep(0)

        async with turns.turn(Client("a")):
            asks = [asyncio.create_task(ask()) for _ in range(3)]
            await asyncio.sleep(0)
            assert room.n_waiting == 3
            with pytest.raises(Refusal, match=r"^The server is busy: 3 requests wait already"):
                await ask()
            asks[1].cancel()
            await asyncio.sleep(0)
            assert room.n_waiting == 2
            asks[0].cancel()  # as its turn comes
        await asyncio.wait(asks)
        assert (turns.n_running, room.n_waiting) == (0, 0)
        await ask()

    asyncio.run(play())


# a server whose requests wait for as long as a test likes


class Held(Strategy):
    """Weighs when it is let go; `busy` counts those that wait for that."""

    name = "held"

    def __init__(self) -> None:
        self.go, self.busy = threading.Event(), threading.Semaphore(0)

    def weigh(self, query: Query, probe: Probe, argument: Any) -> Any:
        self.busy.release()
        assert self.go.wait(PATIENCE_S)
        return np.zeros((len(query.adapters), query.n_layer))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("turns"), n_ctx=8192).folder


@pytest.fixture
def held() -> Iterator[Held]:
    strategy = Held()
    register_strategy(strategy)
    yield strategy
    strategy.go.set()
    del _registry["held"]


# More than two minutes where each token takes 20 ms.
N_LONG = 7000
LONG_ENGINE = {**ENGINE, "n_ctx": 8192}
LONG = {"model": "tiny:base", "max_tokens": N_LONG, "logit_bias": {"65": 100}}


def body_of(**more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "the thing?"}]
    return {"model": "tiny:held", "messages": messages, "max_tokens": 2, **more}


@contextlib.contextmanager
def asking(url: str, n: int, /, **more: Any) -> Iterator[list[httpx.Response]]:
    """Ask so many times at once; the answers are there at the end."""
    found: list[httpx.Response] = []

    def ask() -> None:
        found.append(httpx.post(url, json=body_of(**more), timeout=PATIENCE_S))

    threads = [threading.Thread(target=ask) for _ in range(n)]
    for thread in threads:
        thread.start()
    yield found
    for thread in threads:
        thread.join()


def test_a_full_queue_is_told_at_once(bundle: Path, held: Held) -> None:
    with listening(bundle, max_queue=2) as address:
        url = f"{address}/v1/chat/completions"
        with asking(url, N_TURN + 2) as answers:
            for _ in range(N_TURN):
                assert held.busy.acquire(timeout=PATIENCE_S)
            wait_until(lambda: metric(address, "qaflora_requests_waiting") == 2)
            assert metric(address, "qaflora_requests_running") == N_TURN
            for is_stream in (False, True):
                refused = httpx.post(url, json=body_of(stream=is_stream), timeout=PATIENCE_S)
                assert (refused.status_code, refused.headers["retry-after"]) == (503, "2")
                assert refused.json()["error"] == {
                    "message": "The server is busy: 2 requests wait already; try again later.",
                    "type": "server_error",
                    "param": None,
                    "code": "queue_full",
                }
            assert not answers
            held.go.set()
        assert [answer.status_code for answer in answers] == [200] * (N_TURN + 2)


def test_tokens_wait_for_no_turn(bundle: Path, held: Held) -> None:
    with (
        listening(bundle, max_queue=0) as address,
        asking(f"{address}/v1/chat/completions", N_TURN) as answers,
    ):
        for _ in range(N_TURN):
            assert held.busy.acquire(timeout=PATIENCE_S)
        found = httpx.post(f"{address}/tokenize", json={"content": "a"}, timeout=PATIENCE_S)
        assert len(found.json()["tokens"]) == 1
        assert not answers
        held.go.set()


def test_a_stream_that_is_weighed_for_long_says_that_it_lives(
    bundle: Path, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "PING_S", 0.05)
    with listening(bundle) as address:
        url, body = f"{address}/v1/chat/completions", body_of(stream=True)
        with httpx.stream("POST", url, json=body, timeout=PATIENCE_S) as response:
            lines = response.iter_lines()
            for _ in range(3):
                assert (next(lines), next(lines)) == (": ping", "")
            assert response.status_code == 200
            assert "x-fusion" not in response.headers
            held.go.set()
            rest = [line for line in lines if line.startswith("data: ")]
        assert rest[-1] == "data: [DONE]"
        first = json.loads(rest[0].removeprefix("data: "))
        assert first["fusion"]["strategy"] == "held"


def test_what_fails_behind_a_ping_is_an_event(
    bundle: Path, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Held, *_: Any) -> Any:
        self.busy.release()
        assert self.go.wait(PATIENCE_S)
        raise RuntimeError("a secret of the server")

    monkeypatch.setattr(work, "PING_S", 0.05)
    monkeypatch.setattr(Held, "weigh", fail)
    with listening(bundle) as address:
        url, body = f"{address}/v1/chat/completions", body_of(stream=True)
        with httpx.stream("POST", url, json=body, timeout=PATIENCE_S) as response:
            lines = response.iter_lines()
            assert next(lines) == ": ping"
            held.go.set()
            rest = [line for line in lines if line.startswith("data: ")]
        assert len(rest) == 1
        assert json.loads(rest[0].removeprefix("data: ")) == {
            "error": {
                "message": "The server failed to answer; its log says why.",
                "type": "server_error",
                "param": None,
                "code": "internal_error",
            }
        }
        whole = httpx.post(url, json=body_of(), timeout=PATIENCE_S)
        assert (whole.status_code, whole.json()["error"]["code"]) == (500, "internal_error")
        assert "secret" not in whole.text


def test_the_time_of_a_request_has_an_end(bundle: Path, held: Held) -> None:
    """Of those that wait for a turn at once; of those that are computed at the next step."""
    app = make_app([bundle], make_options())
    with listening_app(app) as address:
        url = f"{address}/v1/chat/completions"
        with asking(url, N_TURN) as answers:
            for _ in range(N_TURN):
                assert held.busy.acquire(timeout=PATIENCE_S)
            app.state.options = make_options(timeout_s=0.1)
            late = httpx.post(url, json=body_of(), timeout=PATIENCE_S)
            assert (late.status_code, late.headers["retry-after"]) == (503, "2")
            assert late.json()["error"]["code"] == "timeout"
            assert not answers
            expire_all(app)
            held.go.set()
        assert len(answers) == N_TURN
        assert {answer.json()["error"]["code"] for answer in answers} == {"timeout"}


@pytest.fixture
def decodes(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """When something was decoded; each takes 20 ms at least."""
    times: list[float] = []
    decode = Context.decode_spans

    def slow(self: Context, spans: Any) -> Any:
        times.append(time.monotonic())
        time.sleep(0.02)
        return decode(self, spans)

    monkeypatch.setattr(Context, "decode_spans", slow)
    return times


def test_an_answer_that_is_cut_by_time_keeps_its_text(bundle: Path, decodes: list[float]) -> None:
    app = make_app([bundle], make_options(engine=LONG_ENGINE))
    with (
        listening_app(app) as address,
        asking(f"{address}/v1/chat/completions", 1, **LONG) as answers,
    ):
        wait_until(lambda: len(decodes) > 5)
        expire_all(app)
    found = answers[0].json()
    choice = found["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"].strip("A") == ""
    assert 0 < len(choice["message"]["content"]) == found["usage"]["completion_tokens"] < N_LONG


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/v1/chat/completions", {"n": 3}),
        ("/v1/completions", {"n": 2}),
        ("/v1/completions", {"prompt": ["the", "thing"]}),
    ],
)
@pytest.mark.parametrize("is_stream", [False, True])
def test_answers_that_time_keeps_from_beginning_are_not_left_out(
    bundle: Path, decodes: list[float], path: str, asked: dict[str, Any], is_stream: bool
) -> None:
    app = make_app([bundle], make_options(engine=LONG_ENGINE))
    asked = {"prompt": "the", **LONG, **asked, "stream": is_stream}
    with listening_app(app) as address, asking(f"{address}{path}", 1, **asked) as answers:
        wait_until(lambda: len(decodes) > 5)
        expire_all(app)
    assert answers[0].status_code == (200 if is_stream else 503)
    event = answers[0].text.split("data: ")[-1]
    assert json.loads(event)["error"]["code"] == "timeout"


@pytest.mark.parametrize("is_stream", [True, False])
def test_for_who_goes_away_nothing_is_computed(
    bundle: Path, decodes: list[float], is_stream: bool
) -> None:
    body = body_of(**LONG, stream=is_stream)
    with listening(bundle, engine=LONG_ENGINE) as address:
        host, port = address.removeprefix("http://").split(":")
        data = json.dumps(body).encode()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}"
        )
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head.encode() + b"\r\n\r\n" + data)
            wait_until(lambda: len(decodes) > 5)
        wait_until(lambda: metric(address, "qaflora_requests_running") == 0)
        n_decoded = len(decodes)
        time.sleep(0.2)
        assert len(decodes) == n_decoded < N_LONG
        # who waits is not kept by those who are gone
        body = body_of(model="tiny:base", max_tokens=2)
        found = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=PATIENCE_S)
        assert found.status_code == 200


def test_only_long_texts_wait_to_be_tokenized(bundle: Path, held: Held) -> None:
    def ask(address: str, n: int) -> httpx.Response:
        body = {"model": "tiny", "content": "a" * n}
        return httpx.post(f"{address}/tokenize", json=body, timeout=PATIENCE_S)

    with listening(bundle, max_queue=0) as address:
        with asking(f"{address}/v1/chat/completions", N_TURN):
            for _ in range(N_TURN):
                assert held.busy.acquire(timeout=PATIENCE_S)
            assert len(ask(address, MAX_LIGHT_CHARS).json()["tokens"]) == MAX_LIGHT_CHARS
            late = ask(address, MAX_LIGHT_CHARS + 1)
            assert (late.status_code, late.json()["error"]["code"]) == (503, "queue_full")
            held.go.set()
        assert len(ask(address, MAX_LIGHT_CHARS + 1).json()["tokens"]) == MAX_LIGHT_CHARS + 1


def test_who_goes_away_while_waiting_leaves_the_queue(bundle: Path, held: Held) -> None:
    data = json.dumps(body_of()).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}"
    with listening(bundle) as address:
        host, port = address.removeprefix("http://").split(":")
        with asking(f"{address}/v1/chat/completions", N_TURN) as answers:
            for _ in range(N_TURN):
                assert held.busy.acquire(timeout=PATIENCE_S)
            with socket.create_connection((host, int(port))) as connection:
                connection.sendall(head.encode() + b"\r\n\r\n" + data)
                wait_until(lambda: metric(address, "qaflora_requests_waiting") == 1)
            wait_until(lambda: metric(address, "qaflora_requests_waiting") == 0)
            held.go.set()
        assert [answer.status_code for answer in answers] == [200] * N_TURN


def test_every_answer_among_others_is_the_one_given_alone(bundle: Path) -> None:
    asks: list[dict[str, Any]] = [
        {"strategy": strategy, "seed": seed, "content": content, "max_tokens": n}
        for seed, content in enumerate(("the thing?", "a longer question of the king", "er"))
        for n, strategy in ((5, "qa-flora"), (40, "static"), (17, "single:es"), (30, "cosine"))
    ]
    found: dict[int, str] = {}
    with listening(bundle) as address:

        def ask(i: int) -> None:
            one = dict(asks[i])
            body = {
                "model": f"tiny:{one.pop('strategy')}",
                "messages": [{"role": "user", "content": one.pop("content")}],
                "temperature": 1.0,
                **one,
            }
            url = f"{address}/v1/chat/completions"
            answer = httpx.post(url, json=body, timeout=PATIENCE_S).json()
            found[i] = answer["choices"][0]["message"]["content"]

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(asks))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    with Engine(bundle, n_ctx=512, threads=1, kv_type="f32") as engine:
        for i, one in enumerate(asks):
            expected = engine.chat(
                [{"role": "user", "content": one["content"]}],
                weights=one["strategy"],
                seed=one["seed"],
                max_tokens=one["max_tokens"],
                temperature=1.0,
            )
            assert found[i] == expected["choices"][0]["message"]["content"], one
