"""Models by name: the shipped list, and fetching from packages without a network.

The packages are real wheels made here and found by pip in a folder.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from patience import PATIENCE_S

from qaflora_edge.errors import DownloadError, OutputFileError, RegistryError
from qaflora_edge.formats import names as registry
from qaflora_edge.hub.fetch import fetch_model

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

    def one_part(self, **changes: Any) -> None:
        """Let the model come in one part."""
        write_wheel(self.wheels, 1, CONTENT)
        self.write(sources=[package_source([CONTENT])], **changes)

    def remove_wheel(self, number: int) -> None:
        next(self.wheels.glob(f"fake_part{number}-*")).unlink()

    @property
    def parts(self) -> list[str]:
        return sorted(path.name for path in self.cache.glob("parts/*/*"))

    @property
    def env(self) -> dict[str, str]:
        return {
            "QAFLORA_CACHE": str(self.cache),
            "PIP_FIND_LINKS": str(self.wheels),
            "PIP_NO_INDEX": "1",
            "PIP_CONFIG_FILE": os.devnull,
        }

    def run_killed(self, at_bytes: int) -> None:
        """Fetch in another process that kills itself once so many bytes are there."""
        script = textwrap.dedent(f"""
            import os, pathlib, signal
            from qaflora_edge.formats import names as registry
            from qaflora_edge.hub.fetch import fetch_model
            registry.package_data = lambda name: pathlib.Path({str(self.registry)!r})
            def progress(done, total):
                if done >= {at_bytes}:
                    os.kill(os.getpid(), signal.SIGKILL)
            fetch_model("fake", progress=progress)
        """)
        result = subprocess.run([sys.executable, "-c", script], env=os.environ | self.env)
        assert result.returncode == -signal.SIGKILL


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shop]:
    shop = Shop(tmp_path)
    for name, value in shop.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(registry, "package_data", lambda name: shop.registry)
    # The client reads the environment when it is imported, which another test may have done.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    yield shop
    assert list(shop.cache.glob("models/.tmp-*")) == [], "a temporary file was left behind"


# --- the shipped registry -----------------------------------------------------------------------


def test_the_shipped_registry_is_whole() -> None:
    models = registry.load_registry()
    assert list(models) == [
        "smollm2-135m-instruct",
        "qwen2.5-coder-0.5b-instruct",
        "qwen2.5-coder-1.5b-instruct",
        "gemma-3-270m",
    ]
    assert [model.architecture for model in models.values()] == [
        "llama",
        "qwen2",
        "qwen2",
        "gemma3",
    ]
    for model in models.values():
        kinds = [type(source) for source in model.sources]
        assert kinds == [registry.PackageSource, registry.HubSource]
        assert re.fullmatch(r"[\w.-]+\.gguf", model.file)  # a plain name: it is joined to a folder
        assert re.fullmatch("[0-9a-f]{64}", model.sha256)
        assert model.kind in ("base", "chat")
        packages = model.sources[0]
        assert isinstance(packages, registry.PackageSource)
        assert sum(part.size_bytes for part in packages.parts) == model.size_bytes
        assert model.license


def test_smollm2_is_the_file_that_the_registry_promises(smollm2: Path) -> None:
    model = registry.find_model("smollm2-135m-instruct")
    assert sha256(smollm2.read_bytes()).hexdigest() == model.sha256
    assert smollm2.read_bytes()[:4] == b"GGUF"


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(RegistryError) as caught:
        registry.find_model("gpt-5")
    assert str(caught.value) == (
        "There is no model 'gpt-5' in the registry; it knows smollm2-135m-instruct, "
        "qwen2.5-coder-0.5b-instruct, qwen2.5-coder-1.5b-instruct, gemma-3-270m. "
        "See 'qaflora models', or give a Hugging Face Hub repository as owner/name."
    )


# --- fetching from packages -----------------------------------------------------------------------


@pytest.mark.slow
def test_fetch_joins_the_parts_reports_and_keeps(shop: Shop, tmp_path: Path) -> None:
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
    copied = fetch_model("fake", to=tmp_path / "new" / "folder")
    assert copied == tmp_path / "new" / "folder" / "fake.gguf"
    assert copied.read_bytes() == CONTENT


@pytest.mark.slow
def test_a_killed_download_goes_on_with_the_parts_that_are_whole(shop: Shop) -> None:
    shop.run_killed(at_bytes=len(PARTS[0]))
    assert not list(shop.cache.glob("models/*"))
    assert shop.parts == ["01-fake-part1==1.0.whl"]
    shop.remove_wheel(1)  # so that it cannot be fetched again
    assert fetch_model("fake").read_bytes() == CONTENT


@pytest.mark.slow
def test_a_broken_part_is_fetched_again_and_alone(shop: Shop) -> None:
    shop.run_killed(at_bytes=len(CONTENT))
    shop.remove_wheel(2)
    broken = next(shop.cache.glob("parts/*/01-*"))
    broken.write_bytes(broken.read_bytes()[:-100])
    with pytest.raises(DownloadError, match=r"the wheel of fake-part1==1\.0 is wrong \("):
        fetch_model("fake")
    assert fetch_model("fake").read_bytes() == CONTENT


@pytest.mark.slow
def test_finished_parts_stay_when_one_cannot_be_had(shop: Shop) -> None:
    shop.remove_wheel(2)
    with pytest.raises(DownloadError) as caught:
        fetch_model("fake")
    message = str(caught.value)
    assert message.startswith(
        f"Could not fetch the model 'fake': none of its 1 sources gave fake.gguf ({len(CONTENT)} "
        f"bytes, sha256 {sha256(CONTENT).hexdigest()}).\n"
        "  - packages fake-part1==1.0, fake-part2==1.0: pip could not fetch "
        "fake-part2==1.0 (exit code 1): "
    )
    assert message.endswith(
        f"\nCheck the network and try again (what is whole stays in {shop.cache}), or put the "
        f"file at {shop.cache / 'models' / 'fake.gguf'} yourself."
    )
    assert shop.parts == ["01-fake-part1==1.0.whl"]


@pytest.mark.slow
def test_a_wrong_hash_gives_no_file_and_drops_the_parts(shop: Shop) -> None:
    shop.one_part(sha256="0" * 64)
    with pytest.raises(DownloadError) as caught:
        fetch_model("fake")
    assert (
        f"what came is not fake.gguf: its sha256 is {sha256(CONTENT).hexdigest()}, expected "
        f"{'0' * 64}. It was thrown away."
    ) in str(caught.value)
    assert os.listdir(shop.cache / "models") == []
    assert shop.parts == []


@pytest.mark.slow
def test_the_hub_is_named_when_it_fails_too(shop: Shop) -> None:
    shop.remove_wheel(1)
    hub = {"type": "hub", "repo": "owner/name", "revision": "abc", "file": "f.gguf"}
    shop.write(sources=[package_source(PARTS), hub])
    with pytest.raises(DownloadError) as caught:
        fetch_model("fake")
    assert "none of its 2 sources" in str(caught.value)
    assert "\n  - Hub owner/name@abc, f.gguf: Could not pull owner/name/f.gguf@abc: " in str(
        caught.value
    )


@pytest.mark.slow
def test_an_interrupt_stops_pip_and_leaves_nothing_half_done(shop: Shop) -> None:
    n_call = 0

    def progress(done: int, total: int) -> None:
        nonlocal n_call
        n_call += 1
        if n_call == 2:  # the first call comes before pip starts
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch_model("fake", progress=progress)
    assert n_call == 2
    assert shop.parts in ([], ["01-fake-part1==1.0.whl"])
    assert list(shop.cache.glob("models/*")) == []
    assert fetch_model("fake").read_bytes() == CONTENT


@pytest.mark.slow
def test_a_file_of_the_users_is_compared_and_never_replaced(shop: Shop, tmp_path: Path) -> None:
    content = bytes(len(CONTENT))
    to = tmp_path / "to"
    target = fetch_model("fake", to=to)
    shutil.rmtree(shop.wheels)
    assert fetch_model("fake", to=to) == target
    target.write_bytes(content)
    with pytest.raises(OutputFileError) as caught:
        fetch_model("fake", to=to)
    assert str(caught.value) == (
        f"Cannot pull fake to {to}: there is another fake.gguf, which is not the one of "
        f"{len(CONTENT)} bytes with the SHA-256 {sha256(CONTENT).hexdigest()}. Name another folder "
        "with --to, or remove it."
    )
    assert target.read_bytes() == content


@pytest.mark.slow
def test_two_processes_fetch_once(shop: Shop) -> None:
    script = textwrap.dedent(f"""
        import pathlib
        from qaflora_edge.formats import names as registry
        from qaflora_edge.hub.fetch import fetch_model
        registry.package_data = lambda name: pathlib.Path({str(shop.registry)!r})
        calls = []
        fetch_model("fake", progress=lambda done, total: calls.append(done))
        print(len(calls) > 0)
    """)
    command = [sys.executable, "-c", script]
    env = os.environ | shop.env
    running = [
        subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    outputs = sorted(process.communicate(timeout=PATIENCE_S)[0].strip() for process in running)
    assert [process.returncode for process in running] == [0, 0, 0]
    assert outputs == ["False", "False", "True"]
    assert (shop.cache / "models" / "fake.gguf").read_bytes() == CONTENT
