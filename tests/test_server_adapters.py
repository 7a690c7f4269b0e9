"""Adapters in and out of a running server, where --allow-adapters is given."""

import errno
import io
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bundles import qaflora
from patience import PATIENCE_S
from serving import client_of, error_of
from starlette.testclient import TestClient
from tiny import USER, write_tiny_adapter, write_tiny_base, write_tiny_peft

from qaflora_edge.formats import inputs
from qaflora_edge.server import uploads


@pytest.fixture
def folder(made, tmp_path) -> Path:
    place = tmp_path / "allowed"
    write_tiny_peft(place / "peft", made.base, seed=5)
    write_tiny_adapter(place / "fr.gguf", made.base, seed=6)
    write_tiny_adapter(place / "wrong.gguf", write_tiny_base(tmp_path / "b.gguf", n_embd=32))
    return place


@pytest.fixture
def client(made, folder) -> Iterator[TestClient]:
    with client_of(made.folder, adapters=folder) as client:
        yield client


def change(client: TestClient, what: str, name: str, **more: Any) -> tuple[int, str]:
    body = {"lora_name": name, **more}
    response = client.post(f"/v1/{what}_lora_adapter", json=body)
    is_done = response.status_code == 200
    return response.status_code, response.text if is_done else response.json()["error"]["code"]


def weighed(client: TestClient) -> list[str]:
    """Who is weighed for a question; what is listed, and hashed, are the same."""
    body = {"messages": USER, "max_tokens": 1}
    fusion = client.post("/v1/chat/completions", json=body).json()["fusion"]
    meta = client.get("/v1/models/tiny").json()["meta"]
    assert meta["adapters"] == [*meta["sha256"]["adapters"]] == [*fusion["weights"]]
    return [*fusion["weights"]]


def test_adapters_come_and_go_in_vllm_s_words(client) -> None:
    assert weighed(client) == ["math", "es"]
    done = "Success: LoRA adapter '{}' {} successfully."
    for name, path in (("fr", "fr.gguf"), ("new", "peft")):
        assert change(client, "load", name, lora_path=path) == (200, done.format(name, "added"))
    assert weighed(client) == ["math", "es", "fr", "new"]
    assert change(client, "unload", "es") == (200, done.format("es", "removed"))
    assert weighed(client) == ["math", "fr", "new"]
    assert change(client, "load", "FR", lora_path="peft") == (400, "invalid_value")  # taken
    assert change(client, "load", "x", lora_path="wrong.gguf") == (400, "invalid_value")
    assert change(client, "load", "../x", lora_path="peft") == (400, "invalid_value")
    assert change(client, "unload", "es") == (404, "adapter_not_found")
    assert weighed(client) == ["math", "fr", "new"]


def test_an_adapter_of_the_hub_is_fetched_while_others_change(client, made, monkeypatch) -> None:
    def fetch(ref: str, *, progress: Any) -> Path:
        progress(1, 2)
        told.append(client.get("/progress?lora_name=es").json())
        other = threading.Thread(target=change, args=(client, "unload", "es"))
        other.start()
        other.join(PATIENCE_S)
        return made.peft

    told: list[dict[str, Any]] = []
    monkeypatch.setattr(uploads, "fetch_hub", fetch)
    assert change(client, "load", "es", hub="owner/es-lora")[0] == 200  # the name was free
    assert told == [{"stage": "it is fetched", "processed": 1, "total": 2}]
    assert weighed(client) == ["math", "es"]
    assert client.get("/progress?lora_name=es").json() == {}


@pytest.mark.usefixtures("own_cache", "hub_cache")
def test_the_hub_has_a_limit(client, hub, monkeypatch) -> None:
    hub.put("owner/model", {"model.gguf": bytes(2 << 20)})
    monkeypatch.setattr(uploads, "MAX_UPLOAD_BYTES", 1 << 20)
    response = client.post("/v1/load_lora_adapter", json={"lora_name": "x", "hub": "owner/model"})
    assert "it has more than 1048576 bytes" in response.json()["error"]["message"]


def test_a_change_keeps_no_slot_busy(client) -> None:
    change(client, "unload", "es")
    assert not any(model.n_user for model in client.app.state.models.by_name.values())


def test_paths_stay_in_the_folder(client, folder, made) -> None:
    (folder / "link").symlink_to(made.peft)
    (folder / "half").mkdir()
    for file in made.peft.iterdir():
        (folder / "half" / file.name).symlink_to(file)
    (folder / "loop").symlink_to(folder / "loop")
    outside = [os.path.relpath(made.peft, folder), str(made.adapter.path), "/etc/passwd"]
    for path in (*outside, "link", "half", "loop", "none", "a\0b", "owner/name"):
        assert change(client, "load", "x", lora_path=path) == (404, "adapter_not_found"), path
    assert change(client, "load", "x") == (404, "adapter_not_found")


def test_a_file_with_holes_is_refused_before_it_is_hashed(client, folder, monkeypatch) -> None:
    n_byte = (folder / "fr.gguf").stat().st_size
    os.truncate(folder / "fr.gguf", 64 << 30)
    monkeypatch.setattr(inputs, "sha256_file", lambda path: pytest.fail("it is hashed"))
    body = {"lora_name": "x", "lora_path": "fr.gguf"}
    response = client.post("/v1/load_lora_adapter", json=body)
    assert response.status_code == 400
    n_unused = int(re.search(r"fr.gguf: (\d+) of its", response.text)[1])  # type: ignore[index]
    assert (64 << 30) - n_byte < n_unused < 64 << 30
    told = f"{n_unused} of its {64 << 30} bytes belong to no tensor; expected at most 16777216"
    assert told in response.text


@pytest.mark.parametrize("name", ["Base", "two-place", "manual"])
def test_an_adapter_is_not_called_like_a_strategy(client, name) -> None:
    body = {"lora_name": name, "lora_path": "fr.gguf"}
    error = client.post("/v1/load_lora_adapter", json=body).json()["error"]
    assert f"The adapter name '{name}' is that of a strategy; expected another" in error["message"]


def test_uploads_are_checked_and_last_as_long_as_the_adapter(made, folder, monkeypatch) -> None:
    config, weights = (
        (folder / "peft" / f"adapter_{name}").read_bytes()
        for name in ("config.json", "model.safetensors")
    )
    gguf, before = (folder / "fr.gguf").read_bytes(), sorted(folder.iterdir())

    def upload(name: str, body: bytes, n_config: object = 0, **headers: str) -> int:
        query = {"lora_name": name, "config_bytes": n_config}
        return client.post("/upload", content=body, params=query, headers=headers).status_code

    (folder / "upload-abcdefgh").mkdir()  # of a server that was killed
    with client_of(made.folder, adapters=folder) as client:
        assert upload("new", config + weights, len(config)) == 200
        assert upload("fr", gguf) == 200
        assert weighed(client) == ["math", "es", "new", "fr"]
        kept = sorted(folder.iterdir())
        for name, body, n_config in (
            ("fr", gguf, 0),
            ("x", gguf[:-9], 0),
            ("x", config + weights, len(config) - 1),
            ("../x", gguf, 0),
            ("x/y", gguf, 0),
            ("x", gguf, -1),
        ):
            assert upload(name, body, n_config) == 400, (name, n_config)
        monkeypatch.setattr(uploads, "MAX_UPLOAD_BYTES", len(gguf) - 1)
        assert upload("x", gguf) == 413
        with monkeypatch.context() as patch:
            patch.setattr(uploads, "receive", lambda *_: pytest.fail("it is read"))
            assert upload("x", b"", **{"content-length": str(2 << 30)}) == 413
        assert sorted(folder.iterdir()) == kept
        assert change(client, "unload", "fr")[0] == 200
        assert weighed(client) == ["math", "es", "new"]
        assert len([*folder.iterdir()]) == len(kept) - 1
    assert sorted(folder.iterdir()) == before


def test_a_full_disk_is_told(client, folder, monkeypatch, caplog) -> None:
    class Full(io.BytesIO):
        def write(self, data: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    before = sorted(folder.iterdir())
    monkeypatch.setattr(uploads, "open", lambda *_: Full(), raising=False)
    response = client.post("/upload?lora_name=x", content=b"GGUF")
    assert response.status_code == 507
    told = "The upload cannot be written: the disk is full."
    assert response.json()["error"] == error_of("insufficient_storage", told, "server_error")
    assert sorted(folder.iterdir()) == before
    assert not [each for each in caplog.records if each.exc_info]


def test_nothing_changes_where_it_is_not_allowed(made, tmp_path) -> None:
    with client_of(made.folder) as client:
        assert change(client, "load", "x", lora_path="x") == (403, "adapters_not_allowed")
        assert change(client, "unload", "es") == (403, "adapters_not_allowed")
        assert client.post("/upload?lora_name=x").status_code == 403
        assert client.get("/v1/models/tiny").json()["meta"]["takes_adapters"] is False
    result = qaflora("serve", made.folder, "--allow-adapters", tmp_path / "none")
    assert (result.exit_code, "expected a folder" in result.stderr) == (1, True)
