"""Waiting: turns, the bounded queue, the end of time, and clients that go away."""

import asyncio
import contextlib
import json
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
from serving import ENGINE, address_of, error_of, listening, listening_app, make_options, metric

from qaflora_edge import Engine
from qaflora_edge.backend import model
from qaflora_edge.backend.context import Context
from qaflora_edge.backend.model import Model
from qaflora_edge.inference.loop import COMPUTING
from qaflora_edge.inference.sequence import CallEvent
from qaflora_edge.server import app, receive, respond
from qaflora_edge.server.app import expire_all, make_app
from qaflora_edge.server.receive import Places
from qaflora_edge.server.refusals import Refusal
from qaflora_edge.server.served_models import Queue
from qaflora_edge.weighing.strategy import Strategy, _registry, register_strategy

N_TURN = int(ENGINE["n_parallel"]) + 1  # type: ignore[call-overload]


def test_the_queue_is_in_order_and_no_address_has_more_than_a_quarter() -> None:
    ended: dict[str, str] = {}

    async def play() -> None:
        queue, slots = Queue(8), asyncio.Semaphore(1)

        async def ask(address: str, name: str) -> None:
            try:
                async with queue.slot(slots, address):
                    ended[name] = "answered"
                    await asyncio.sleep(0)
            except Refusal as refused:
                ended[name] = refused.body["error"]["code"]

        async with queue.slot(slots, "10.0.0.1"):
            asks = [asyncio.create_task(ask("10.0.0.1", f"often{i}")) for i in range(3)]
            asks += [asyncio.create_task(ask("127.0.0.1", f"here{i}")) for i in range(7)]
            await asyncio.sleep(0)
            assert queue.waiting == {"10.0.0.1": 2, "127.0.0.1": 6}
            asks[0].cancel()
            await asyncio.sleep(0)
            asks.append(asyncio.create_task(ask("10.0.0.2", "other")))
            await asyncio.sleep(0)
        await asyncio.gather(*asks, return_exceptions=True)
        assert not queue.waiting
        assert not slots.locked()

    asyncio.run(play())
    refused = {name for name, end in ended.items() if end == "queue_full"}
    assert refused == {"often2", "here6"}
    answered = [name for name, end in ended.items() if end == "answered"]
    assert answered == ["often1", *(f"here{i}" for i in range(6)), "other"]


class Held(Strategy):
    """Weighs when it is let go; `busy` counts those that wait for that."""

    name = "held"

    def __init__(self) -> None:
        self.go, self.busy = threading.Event(), threading.Semaphore(0)
        self.is_failing = False

    def wait_for_turns(self) -> None:
        """Until as many weigh as may at once."""
        for _ in range(N_TURN):
            assert self.busy.acquire(timeout=PATIENCE_S)

    def plan(self, reading: Any) -> Any:
        self.busy.release()
        assert self.go.wait(PATIENCE_S)
        if self.is_failing:
            raise RuntimeError("a secret of the server")
        return np.zeros((len(reading.query.adapters), reading.query.n_layer))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
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
    found: list[httpx.Response] = []

    def ask() -> None:
        found.append(httpx.post(url, json=body_of(**more), timeout=PATIENCE_S))

    threads = [threading.Thread(target=ask) for _ in range(n)]
    for thread in threads:
        thread.start()
    yield found
    for thread in threads:
        thread.join()


def test_a_full_queue_is_told_at_once(bundle, held) -> None:
    with listening(bundle, max_queue=2) as address:
        url = f"{address}/v1/chat/completions"
        with asking(url, N_TURN + 2) as answers:
            held.wait_for_turns()
            wait_until(lambda: metric(address, "qaflora_requests_waiting") == 2)
            assert metric(address, "qaflora_requests_running") == N_TURN
            for is_stream in (False, True):
                refused = httpx.post(url, json=body_of(stream=is_stream), timeout=PATIENCE_S)
                assert (refused.status_code, refused.headers["retry-after"]) == (503, "2")
                told = "The server is busy: 2 requests wait already; try again later."
                assert refused.json()["error"] == error_of("queue_full", told, "server_error")
            assert not answers
            held.go.set()
        assert [answer.status_code for answer in answers] == [200] * (N_TURN + 2)


@pytest.mark.parametrize("is_failing", [False, True])
def test_a_stream_that_is_weighed_for_long_says_that_it_lives(
    bundle, held, monkeypatch, is_failing
) -> None:
    held.is_failing = is_failing
    monkeypatch.setattr(respond, "PING_S", 0.05)
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
        first = json.loads(rest[0].removeprefix("data: "))
        if is_failing:
            assert len(rest) == 1
            message = "The server failed to answer; its log says why."
            assert first["error"]["message"] == message
        else:
            assert rest[-1] == "data: [DONE]"
            assert first["fusion"]["strategy"] == "held"


def test_the_time_of_a_request_has_an_end(bundle, held) -> None:
    """Of those that wait for a turn at once; of those that are computed at the next step."""
    app = make_app([bundle], make_options())
    with listening_app(app) as address:
        url = f"{address}/v1/chat/completions"
        with asking(url, N_TURN) as answers:
            held.wait_for_turns()
            app.state.options = make_options(timeout_s=0.1)
            late = httpx.post(url, json=body_of(), timeout=PATIENCE_S)
            assert (late.status_code, late.headers["retry-after"]) == (503, "2")
            assert late.json()["error"]["code"] == "timeout"
            assert not answers
            expire_all(app)
            held.go.set()
        assert len(answers) == N_TURN
        assert {answer.json()["error"]["code"] for answer in answers} == {"timeout"}


def test_the_time_of_a_request_begins_again_with_its_slot(bundle, held, monkeypatch) -> None:
    begun = []
    expire_in = respond.Computed._expire_in

    def noting(self: respond.Computed, seconds: float) -> None:
        begun.append((self._state, seconds))
        expire_in(self, seconds)

    monkeypatch.setattr(respond.Computed, "_expire_in", noting)
    held.go.set()
    with listening(bundle, timeout_s=300.0) as address:
        url = f"{address}/v1/chat/completions"
        assert httpx.post(url, json=body_of(), timeout=PATIENCE_S).status_code == 200
    assert begun == [(respond.State.WAITING, 300.0), (respond.State.COMPUTING, 300.0)]


@pytest.mark.parametrize(("computed_s", "status"), [(299.0, 200), (300.0, 503)])
def test_the_time_of_a_request_is_what_was_computed_for_it(
    bundle, held, computed_s, status
) -> None:
    """Else a long prompt that takes turns with others ends before it is prefilled."""
    app = make_app([bundle], make_options(timeout_s=300.0))
    with listening_app(app) as address, asking(f"{address}/v1/chat/completions", 1) as answers:
        assert held.busy.acquire(timeout=PATIENCE_S)
        (call,) = app.state.running
        call.cancel.computed_s = computed_s
        is_checked = threading.Event()
        call._loop.call_soon_threadsafe(call._expire)
        call._loop.call_soon_threadsafe(is_checked.set)
        assert is_checked.wait(PATIENCE_S)
        held.go.set()
    assert answers[0].status_code == status
    assert (call.cancel.computed_s > computed_s) == (status == 200)


@pytest.mark.parametrize("n_other", [0, 1, 3])
def test_steps_of_other_bundles_at_the_same_time_take_their_share(bundle, n_other) -> None:
    call = CallEvent()
    COMPUTING.add(n_other)  # loops that compute as long as this one does
    try:
        with Engine(bundle, n_ctx=256) as engine:
            answer = engine.generate("abc", strategy="base", max_tokens=8, cancel=call)
            answer.text()
    finally:
        COMPUTING.add(-n_other)
    seconds = 1e-3 * (answer.timings.prefill_ms + answer.timings.decode_ms)
    assert call.computed_s == pytest.approx(seconds / (1 + n_other))


@pytest.fixture
def decodes(monkeypatch) -> list[float]:
    """When something was decoded; each takes 20 ms at least."""
    times: list[float] = []
    decode = Context.decode_spans

    def slow(self: Context, spans: Any) -> Any:
        times.append(time.monotonic())
        time.sleep(0.02)
        return decode(self, spans)

    monkeypatch.setattr(Context, "decode_spans", slow)
    return times


def test_an_answer_that_is_cut_by_time_keeps_its_text(bundle, decodes) -> None:
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
    ("path", "asked", "is_stream"),
    [
        ("/v1/chat/completions", {"n": 3}, True),
        ("/v1/completions", {"prompt": ["the", "thing"]}, False),
    ],
)
def test_answers_that_time_keeps_from_beginning_are_not_left_out(
    bundle, decodes, path, asked, is_stream
) -> None:
    app = make_app([bundle], make_options(engine=LONG_ENGINE))
    asked = {"prompt": "the", **LONG, **asked, "stream": is_stream}
    with listening_app(app) as address, asking(f"{address}{path}", 1, **asked) as answers:
        wait_until(lambda: len(decodes) > 5)
        expire_all(app)
    assert answers[0].status_code == (200 if is_stream else 503)
    event = answers[0].text.split("data: ")[-1]
    assert json.loads(event)["error"]["code"] == "timeout"


def test_token_ids_wait_for_no_answer(bundle, held) -> None:
    with (
        listening(bundle, max_queue=0) as address,
        asking(f"{address}/v1/chat/completions", N_TURN),
    ):
        held.wait_for_turns()
        tokens = httpx.post(f"{address}/tokenize", json={"content": "A"}, timeout=PATIENCE_S)
        held.go.set()
    assert tokens.json() == {"tokens": [65]}


CONTROL = "<|im_end|>"


def test_what_cannot_fit_a_context_is_not_split_to_its_end(bundle, monkeypatch) -> None:
    n_split = Counter[str]()
    split = Model._split

    def noting(self: Model, text: str, *how: bool) -> list[int]:
        n_split["characters"] += len(text)
        return split(self, text, *how)

    monkeypatch.setattr(Model, "_split", noting)
    with listening(bundle) as address:
        text = CONTROL * 100_000
        answer = httpx.post(f"{address}/tokenize", json={"content": text}, timeout=PATIENCE_S)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert n_split["characters"] < len(text) / 4


@pytest.mark.parametrize("is_gone", [False, True], ids=["late", "gone"])
def test_token_ids_end_with_their_time_or_their_client(bundle, monkeypatch, is_gone) -> None:
    split = Model._split
    n_split = Counter[str]()

    def slow(self: Model, text: str, *how: bool) -> list[int]:
        n_split["blocks"] += 1
        time.sleep(0.1)
        return split(self, text, *how)

    monkeypatch.setattr(model, "_BLOCK", len(CONTROL))
    monkeypatch.setattr(respond, "LIGHT_S", PATIENCE_S if is_gone else 0.2)
    app = make_app([bundle], make_options())
    body = {"content": CONTROL * 500}
    with listening_app(app) as address:
        monkeypatch.setattr(Model, "_split", slow)
        url = f"{address}/tokenize"
        if is_gone:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(url, json=body, timeout=0.3)
        else:
            late = httpx.post(url, json=body, timeout=PATIENCE_S)
            assert (late.status_code, late.json()["error"]["code"]) == (503, "timeout")
        wait_until(lambda: not app.state.running)
    assert n_split["blocks"] < 500


LARGE = {"content": "a", "user": "a" * 100_000}
HEAD_OF_LARGE = "POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n"


def test_nobody_waits_for_bodies_that_do_not_come(bundle, monkeypatch) -> None:
    monkeypatch.setattr(receive, "SLOW_S", PATIENCE_S)
    monkeypatch.setattr(receive, "BODY_S", PATIENCE_S)
    with listening(bundle) as address, contextlib.ExitStack() as stack:
        for _ in range(20):
            client = socket.create_connection(address_of(address), PATIENCE_S)
            stack.enter_context(client)
            client.sendall(HEAD_OF_LARGE.encode())
        whole = httpx.post(f"{address}/tokenize", json=LARGE, timeout=60)
    assert whole.status_code == 200


def test_a_large_body_keeps_a_pace(bundle, monkeypatch) -> None:
    monkeypatch.setattr(receive, "SLOW_S", 1.0)
    with (
        listening(bundle) as address,
        socket.create_connection(address_of(address), PATIENCE_S) as client,
    ):
        client.sendall(HEAD_OF_LARGE.encode())
        late = b""
        while not late.endswith(b"}"):
            late += client.recv(65536)
    assert late.startswith(b"HTTP/1.1 408 ")
    assert b"within 60 s, at 65536 bytes a second after the first 1 s." in late


def test_bodies_that_hold_all_room_keep_out_large_ones_alone(bundle, monkeypatch) -> None:
    monkeypatch.setattr(app, "MAX_HELD_BYTES", 150_000)
    monkeypatch.setattr(receive, "SLOW_S", PATIENCE_S)
    with listening(bundle) as address:
        url = f"{address}/tokenize"
        answers = []

        def is_refused() -> bool:
            answers.append(httpx.post(url, json=LARGE, timeout=PATIENCE_S))
            return answers[-1].status_code == 503

        with socket.create_connection(address_of(address), PATIENCE_S) as client:
            client.sendall(HEAD_OF_LARGE.encode() + b"a" * 100_000)
            wait_until(is_refused)
            assert answers[-1].headers["retry-after"] == "2"
            assert answers[-1].json()["error"]["code"] == "too_many_bodies"
            small = httpx.post(url, json={"content": "a"}, timeout=PATIENCE_S)
            assert small.status_code == 200
        wait_until(lambda: not is_refused())
        assert answers[-1].status_code == 200


def test_an_address_has_a_quarter_of_the_places_and_few_wait(monkeypatch) -> None:
    monkeypatch.setattr(receive, "WAIT_S", 0.05)
    held = Counter[str]()
    refused = Counter[str]()

    async def play() -> None:
        places, is_over = Places(8), asyncio.Event()

        async def hold(address: str) -> None:
            try:
                async with places.place(address):
                    held[address] += 1
                    await is_over.wait()
            except Refusal:
                refused[address] += 1

        addresses = ["10.0.0.1"] * 9 + ["10.0.0.2"] * 3 + ["127.0.0.1"] * 9
        tasks = [asyncio.create_task(hold(address)) for address in addresses]
        await asyncio.sleep(0.01)
        assert held == {"10.0.0.1": 2, "10.0.0.2": 2, "127.0.0.1": 4}
        assert refused == {"10.0.0.1": 5}  # two of its wait
        await asyncio.sleep(0.1)
        assert refused == {"10.0.0.1": 7, "10.0.0.2": 1, "127.0.0.1": 5}
        is_over.set()
        await asyncio.gather(*tasks)

    asyncio.run(play())
