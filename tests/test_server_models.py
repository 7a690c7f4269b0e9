"""Several bundles in one server: loaded when asked for, closed beyond --max-models."""

import asyncio
import json
import logging
import shutil
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
from bundles import bundle_json, make_bundle, rewrite
from patience import PATIENCE_S, wait_until
from refusals import refused
from serving import ENGINE, address_of, client_of, listening, make_options, metric
from starlette.testclient import TestClient
from tiny import USER

from qaflora_edge import Engine
from qaflora_edge.backend import model as models
from qaflora_edge.errors import BundleError
from qaflora_edge.server import served_models
from qaflora_edge.server.app import make_app

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def places(made, tmp_path_factory) -> list[Path]:
    """Three bundles of that base, and one of another."""
    place = tmp_path_factory.mktemp("others")
    copies = [named(made.folder, place / name, name) for name in ("one", "two", "three")]
    other = make_bundle(tmp_path_factory.mktemp("other"), seed=7)
    return [*copies, named(other.folder, place / "other", "other")]


def named(folder: Path, target: Path, name: str) -> Path:
    shutil.copytree(folder, target)
    file = str((folder / bundle_json(folder)["base"]["file"]).resolve())
    rewrite(target, lambda raw: raw.update(name=name, base={**raw["base"], "file": file}))
    return target


def loaded(client: TestClient) -> list[str]:
    data = client.get("/v1/models").json()["data"]
    return [each["id"] for each in data if each["meta"]["loaded"] and ":" not in each["id"]]


def ask(client: TestClient, model: str) -> str:
    body = {"model": model, "messages": USER, "max_tokens": 5, "temperature": 0}
    response = client.post(CHAT, json=body)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


def test_bundles_are_loaded_when_they_are_asked_for_and_share_their_base(places) -> None:
    with client_of(*places) as client:
        assert loaded(client) == ["one"]
        answers = {name: ask(client, name) for name in ("other", "three")}
        assert loaded(client) == ["one", "three", "other"]
        body = {"messages": USER}
        assert client.post(CHAT, json=body).status_code == 400  # which one?
        assert client.post("/tokenize", json={"content": "a", "model": "two"}).status_code == 200
        assert loaded(client) == ["one", "two", "three", "other"]
        bundles = client.app.state.models.by_name  # type: ignore[attr-defined]
        bases = [each.engine._model for each in bundles.values()]
        assert bases[0] is bases[1] is bases[2]
        assert len(models._shared) == len({*bases}) == 2
    assert models._shared == {}
    for name, place in (("other", places[3]), ("three", places[2])):
        with Engine(place, **ENGINE) as engine:  # type: ignore[arg-type]
            choices = engine.chat(USER, max_tokens=5)["choices"]
            assert answers[name] == choices[0]["message"]["content"]


def test_a_bundle_is_opened_once_though_who_asked_is_gone(places, monkeypatch) -> None:
    opened, is_let = list[Engine](), threading.Event()

    def open_late(place: Path, **options: Any) -> Engine:
        if place.name != "one":
            assert is_let.wait(PATIENCE_S)
        opened.append(Engine(place, **options))
        return opened[-1]

    def ask_and_go(url: str, model: str) -> None:
        body = json.dumps({"model": model, "messages": USER}).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        with socket.create_connection(address_of(url), PATIENCE_S) as client:
            client.sendall(head.encode() + body)
            wait_until(lambda: metric(url, "qaflora_requests_running") == 1)
        wait_until(lambda: metric(url, "qaflora_requests_running") == 0)

    monkeypatch.setattr(served_models, "Engine", open_late)
    with listening(*places, hosts=None) as url:
        for model in ("two", "two", "three"):
            ask_and_go(url, model)
        is_let.set()  # the server ends when they are open, and closes them
    assert len(opened) == 3
    assert all(engine._core.is_closed for engine in opened)
    assert models._shared == {}


def test_beyond_max_models_the_one_not_used_for_the_longest_is_closed(places, caplog) -> None:
    with client_of(*places, max_models=2) as client, caplog.at_level(logging.INFO):
        ask(client, "two")
        assert loaded(client) == ["one", "two"]
        ask(client, "one")
        ask(client, "three")
        assert loaded(client) == ["one", "three"]
        bundles = client.app.state.models.by_name  # type: ignore[attr-defined]
        for name in ("one", "three"):  # as long as they are in use
            bundles[name].n_user += 1
        ask(client, "two:base")
        assert loaded(client) == ["one", "two", "three"]
    assert "closed two: --max-models are open" in caplog.text


def test_a_bundle_is_closed_once_it_was_not_used_for_a_time(places) -> None:
    with client_of(*places, ttl_s=0.5) as client:
        wait_until(lambda: loaded(client) == [])
        bundles = client.app.state.models.by_name  # type: ignore[attr-defined]
        bundles["one"].n_user += 1  # as long as it is in use
        ask(client, "one")
        ask(client, "two")
        wait_until(lambda: loaded(client) == ["one"])
        bundles["one"].n_user -= 1
        ask(client, "one")
        wait_until(lambda: loaded(client) == [])


def test_who_asks_as_a_bundle_is_closed_gets_another_engine(places) -> None:
    async def main() -> None:
        models = served_models.ServedModels(places, make_options(ttl_s=3600.0))
        model = models.by_name["one"]
        with pytest.raises(TimeoutError):  # who asked first is gone while it is opened
            async with asyncio.timeout(0.001), models.engine(model):
                pass
        assert model.opening is not None
        await model.opening
        assert model.expiry is not None
        assert not model.expiry.cancelled()
        first = model.engine
        models.close_idle(model)
        async with models.engine(model) as engine:
            assert first is not None
            assert first._core.is_closed
            assert engine is not first
            assert engine.tokenize("a")
        await models.close()

    asyncio.run(main())


def test_a_bundle_that_cannot_be_opened_is_told_to_the_log(places, tmp_path, caplog) -> None:
    broken = named(places[0], tmp_path / "broken", "broken")
    with client_of(places[1], broken) as client:
        (broken / "adapters" / "es.gguf").write_bytes(b"GGUF")
        response = client.post(CHAT, json={"model": "broken", "messages": USER})
        assert (response.status_code, response.headers["retry-after"]) == (503, "2")
        assert response.json()["error"]["message"] == (
            "The model broken cannot be opened; the server's log says why."
        )
        assert str(broken) not in response.text
        assert str(broken) in caplog.text
        meta = {name: client.get(f"/v1/models/{name}").json()["meta"] for name in ("two", "broken")}
        assert {name for name, each in meta.items() if each["failed"]} == {"broken"}
        assert client.get("/health").json() == {"status": "ok"}  # of the server, not of a bundle
        assert ask(client, "two") == ask(client, "two:qa-flora")
        shutil.copy(places[0] / "adapters" / "es.gguf", broken / "adapters" / "es.gguf")
        assert ask(client, "broken") == ask(client, "two")
        assert not client.get("/v1/models/broken").json()["meta"]["failed"]


def test_a_server_that_can_answer_nothing_says_so(places, tmp_path) -> None:
    broken = named(places[0], tmp_path / "broken", "broken")
    adapter = broken / "adapters" / "es.gguf"
    adapter.write_bytes(b"GGUF")
    with client_of(broken) as client:
        health = client.get("/health")
        assert (health.status_code, health.json()) == (503, {"status": "error"})
        shutil.copy(places[0] / "adapters" / "es.gguf", adapter)
        assert ask(client, "broken")
        health = client.get("/health")
        assert (health.status_code, health.json()) == (200, {"status": "ok"})
        [model] = client.app.state.models.by_name.values()  # type: ignore[attr-defined]
        model.engine.close()  # as where a worker is lost: nothing computes
        wait_until(lambda: client.get("/health").json() == {"status": "error"})
    adapter.write_bytes(b"GGUF")
    with client_of(broken, places[1]) as client:
        assert client.get("/health").json() == {"status": "ok"}


def test_names_are_different(places) -> None:
    assert refused(BundleError, make_app, [places[0], places[0]], make_options()) == (
        f"Cannot serve {places[0]}: its name one is that of {places[0]} too, expected different "
        "names. Change `name` in the bundle.json of one."
    )


def test_a_base_alone_is_a_model(made) -> None:
    with client_of(made.base.path) as client:
        names = [each["id"] for each in client.get("/v1/models").json()["data"]]
        assert names == ["base", "base:base"]
        found = client.post(CHAT, json={"messages": USER, "max_tokens": 1})
        assert found.json()["fusion"]["weights"] == {}
        assert "x-fusion" not in found.headers
