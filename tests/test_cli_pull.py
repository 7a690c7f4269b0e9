"""qaflora pull and qaflora models, off the network"""

import json
from pathlib import Path

import pytest
from bundles import bundle_json, make_bundle
from click.testing import CliRunner, Result
from hubs import FakeHub

from qaflora_edge.bundles.open import load_bundle
from qaflora_edge.cli import main
from qaflora_edge.errors import BundleError
from qaflora_edge.formats import names as registry

ADAPTERS = ("adapters/math.gguf", "adapters/es.gguf")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QAFLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def qaflora(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def place(name: str) -> Path:
    """Put a file of a registry model's size where a pull would put it (holes take no space)."""
    model = registry.find_model(name)
    path = registry.models_dir() / model.file
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.truncate(model.size_bytes)
    return path


def test_models_tells_what_is_here() -> None:
    path = place("smollm2-135m-instruct")
    result = qaflora("models")
    assert (result.exit_code, result.stderr) == (0, "")
    assert f"here: {path}" in result.stdout
    assert "get it: qaflora pull gemma-3-270m" in result.stdout
    shown = json.loads(qaflora("models", "--json").stdout)
    assert list(shown) == list(registry.load_registry())
    assert shown["smollm2-135m-instruct"]["path"] == str(path)
    assert shown["gemma-3-270m"]["path"] is None


def test_pull_from_the_hub(hub: FakeHub, hub_cache: Path, tmp_path: Path) -> None:
    commit = hub.put("owner/name", {"base.gguf": b"GGUF base"})
    path = hub_cache / "models--owner--name" / "snapshots" / commit / "base.gguf"
    for _ in range(2):
        result = qaflora("pull", "owner/name/base.gguf")
        assert (result.exit_code, result.stdout, result.stderr) == (0, f"{path}\n", "")
    result = qaflora("pull", f"owner/name@{commit}", "--to", tmp_path / "to")
    assert (result.exit_code, result.stdout) == (0, f"{tmp_path / 'to' / 'base.gguf'}\n")
    commit = hub.put("owner/name", {"base.gguf": b"GGUF newer"})
    assert qaflora("pull", "owner/name/base.gguf").stdout == f"{path}\n"
    result = qaflora("pull", "owner/name/base.gguf", "--update")
    assert Path(result.stdout.strip()).read_bytes() == b"GGUF newer"


def hub_bundle(server: FakeHub, place: Path, **base_fields: str) -> bytes:
    """Put a bundle and its base on the Hub, as owner/bundle and owner/base; give the base."""
    place.mkdir()
    made = make_bundle(place)
    base = made.base.path.read_bytes()
    server.put("owner/base", {"base.gguf": base})
    raw = bundle_json(made.folder)
    del raw["base"]["file"]
    raw["base"].update(base_fields)
    adapters = {path: (made.folder / path).read_bytes() for path in ADAPTERS}
    server.put("owner/bundle", {"bundle.json": json.dumps(raw).encode(), **adapters})
    made.base.path.unlink()
    return base


def test_pull_with_the_base(hub: FakeHub, hub_cache: Path, tmp_path: Path) -> None:
    hub_bundle(hub, tmp_path / "made", hub="owner/base/base.gguf")
    folder = Path(qaflora("pull", "owner/bundle").stdout.strip())
    with pytest.raises(BundleError) as caught:
        load_bundle(folder)
    assert "is not here; fetch it with `qaflora pull owner/base/base.gguf`" in str(caught.value)
    result = qaflora("pull", "owner/bundle", "--with-base")
    assert (result.exit_code, result.stdout, result.stderr) == (0, f"{folder}\n", "")
    loaded = load_bundle(folder)
    assert loaded.base_path.is_relative_to(hub_cache)
    hub.requests.clear()
    assert qaflora("pull", "owner/bundle", "--with-base").exit_code == 0
    assert hub.requests == []
    address = f"https://huggingface.co/owner/bundle/tree/{folder.name}"
    assert qaflora("pull", address).stdout == f"{folder}\n"
    for ref in ("owner/bundle", address, "https://huggingface.co/owner/bundle"):
        verified = qaflora("bundle", "verify", ref)
        assert verified.stdout == f"{folder}: the base and 2 adapters are the recorded ones.\n"


def test_a_bundle_that_was_not_pulled_is_named_with_the_command() -> None:
    result = qaflora("bundle", "show", "owner/bundle")
    assert result.exit_code == 1
    assert result.stderr == (
        "Error: Cannot open the bundle owner/bundle: there is no such folder, and it was not "
        "pulled. Fetch it with `qaflora pull owner/bundle`, or give the folder of a bundle.\n"
    )
