"""qaflora pull and qaflora models, off the network"""

import json
from pathlib import Path

import pytest
from bundles import snapshot
from click.testing import CliRunner, Result

from qaflora_edge import registry
from qaflora_edge.cli import main


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QAFLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def qaflora(*args: str) -> Result:
    return CliRunner().invoke(main, list(args))


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


def test_pull_of_what_is_here_prints_its_place() -> None:
    path = place("smollm2-135m-instruct")
    result = qaflora("pull", "smollm2-135m-instruct")
    assert (result.exit_code, result.stdout, result.stderr) == (0, f"{path}\n", "")


def test_pull_of_an_unknown_name_fails(tmp_path: Path) -> None:
    result = qaflora("pull", "no-such-model")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("Error: There is no model 'no-such-model' in the registry;")
    assert snapshot(tmp_path) == {}


def test_pull_of_no_reference_fails(tmp_path: Path) -> None:
    result = qaflora("pull", "../x/y")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "Cannot use '../x/y' as a Hugging Face Hub reference" in result.stderr
    assert snapshot(tmp_path) == {}


def test_pull_of_a_pulled_hub_file_prints_its_place(cache: Path) -> None:
    path = cache / "hub-files" / "owner--name" / "base.gguf"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"x")
    result = qaflora("pull", "owner/name/base.gguf")
    assert (result.exit_code, result.stdout) == (0, f"{path}\n")
