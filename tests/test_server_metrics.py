"""What a server tells of itself: metrics, and a line of the log for each request."""

import logging
import re
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from serving import client_of, error_of
from starlette.testclient import TestClient

from qaflora_edge.server.metrics import _line

CHAT = "/v1/chat/completions"
SECRET = "the thing that nobody is to know"
BODY = {"model": "tiny:static", "messages": [{"role": "user", "content": SECRET}], "max_tokens": 3}
LINES = "qaflora_edge.server"


@pytest.fixture
def client(made) -> Iterator[TestClient]:
    with client_of(made.folder) as client:
        yield client


def samples(client: TestClient) -> dict[tuple[str, ...], float]:
    """(name, labels' values) -> value."""
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(client.get("/metrics").text)
        for sample in family.samples
    }


def test_metrics_count_what_was_answered(client) -> None:
    used = client.post(CHAT, json=BODY).json()["usage"]
    stream = client.post(CHAT, json={**BODY, "stream": True})
    assert stream.text.endswith("data: [DONE]\n\n")
    client.post(CHAT, json={**BODY, "n": 0})
    client.post("/v1/weights", json={"prompt": "the", "raw": True, "model": "tiny"})
    for path in ("/nothing", "/nothing/at/all"):
        client.get(path)
    found = samples(client)
    assert {name.split("_")[0] for name, *_ in found} == {"qaflora"}
    assert found["qaflora_requests_total", CHAT, "200"] == 2
    assert found["qaflora_requests_total", CHAT, "400"] == 1
    assert found["qaflora_requests_total", "other", "404"] == 2
    assert found["qaflora_completion_tokens_total", "tiny"] == 6
    assert found["qaflora_prompt_tokens_total", "tiny"] == 2 * used["prompt_tokens"] + 1
    assert found["qaflora_first_token_seconds_count",] == 2
    assert found["qaflora_probe_seconds_count",] == 3
    assert found["qaflora_requests_running",] == found["qaflora_requests_waiting",] == 0
    assert found["qaflora_bundles_loaded",] == 1
    assert 0 < found["qaflora_first_token_seconds_sum",] < 60


def test_a_request_is_a_line_without_what_was_asked(client, caplog) -> None:
    with caplog.at_level(logging.INFO, LINES):
        client.post(CHAT, json=BODY)
        client.get("/v1/nothing%0d%0a2026 INFO forged", headers={"x": SECRET})
        client.post(CHAT, json={**BODY, "temperature": -1})
    lines = [record.getMessage() for record in caplog.records if record.name == LINES]
    number = r"\d+\.\d"
    assert re.fullmatch(
        rf"testclient POST {CHAT} 200 {number}ms model=tiny strategy=static prompt_tokens=\d+ "
        rf"completion_tokens=3 wait_ms={number} first_ms={number}",
        lines[0],
    )
    assert len(lines) == 3
    assert not any("\n" in line or "\r" in line for line in lines)
    assert SECRET not in caplog.text


def test_no_client_forges_a_field_of_the_log() -> None:
    scope = {"client": ("10.0.0.1 GET / 200", 0), "method": "GET /x 200 " + "x" * 1000}
    line = _line({**scope, "path": "/a 200 1ms model=b\n"}, 404, {"whole_ms": 1.0})
    assert len(line.split()) == 5
    assert len(line) < 500


def test_what_fails_is_told_to_the_log_and_not_to_who_asked(client, caplog, monkeypatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("/home/me/secret")

    monkeypatch.setattr("qaflora_edge.engine.Engine.submit_all", fail)
    response = client.post(CHAT, json=BODY)
    assert response.status_code == 500
    told = "The server failed to answer; its log says why."
    assert response.json()["error"] == error_of("internal_error", told, "server_error")
    assert "/home/me/secret" in caplog.text
