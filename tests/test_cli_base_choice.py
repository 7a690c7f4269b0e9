"""convert and bundle create without --base: the adapter says which it is."""

from pathlib import Path

import pytest
import tiny
from bundles import TinyBundle, make_sources, qaflora

from qaflora_edge.formats import names as registry
from qaflora_edge.formats.bundle import read_bundle_text

MODEL = "smollm2-135m-instruct"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAFLORA_CACHE", str(tmp_path / "cache"))


def make(place: Path, trained_on: str | None) -> TinyBundle:
    made = make_sources(place)
    config = {"base_model_name_or_path": trained_on}
    tiny.write_tiny_peft(place / "named", made.base, config=config)
    return made


def commands(place: Path) -> list[list[object]]:
    return [
        ["convert", place / "named", "-o", place / "out.gguf"],
        ["bundle", "create", place / "b", "--adapter", f"m={place / 'named'}", "--no-calibrate"],
    ]


def test_base_that_is_here_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make(tmp_path, "HuggingFaceTB/SmolLM2-135M-Instruct")
    monkeypatch.setattr(registry, "local_path", lambda model, folder=None: made.base.path)
    for line in commands(tmp_path):
        result = qaflora(*line)
        assert result.exit_code == 0, result.stderr
        assert result.stderr.startswith(
            "The adapter says that it was trained on HuggingFaceTB/SmolLM2-135M-Instruct: the base "
            f"is {MODEL}.\n"
        )
    assert read_bundle_text(tmp_path / "b").base.registry == MODEL


def test_adapters_are_read_as_the_converter_reads_them(tmp_path: Path) -> None:
    made = make_sources(tmp_path)
    config = {"base_model_name_or_path": "owner/peft"}
    tiny.write_tiny_peft(tmp_path / "outer" / "checkpoint-9", made.base, config=config)
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "adapter_config.json").write_text(
        '{"fine_tune_type": "lora", "model": "owner/mlx"}'
    )
    for folder, name in (("outer", "owner/peft"), ("mlx", "owner/mlx")):
        result = qaflora("convert", tmp_path / folder, "-o", tmp_path / "out.gguf")
        assert result.exit_code == 2
        assert f"trained on {name}: give a GGUF of it" in result.stderr


def test_base_that_is_not_here_is_named_with_the_pull(tmp_path: Path) -> None:
    make(tmp_path, "HuggingFaceTB/SmolLM2-135M-Instruct")
    for line in commands(tmp_path):
        result = qaflora(*line)
        assert (result.exit_code, result.stdout) == (2, "")
        assert (
            "The adapter says that it was trained on HuggingFaceTB/SmolLM2-135M-Instruct, which is "
            f"not here; `qaflora pull {MODEL}` fetches it (98 MB), and --base {MODEL} names it."
        ) in result.stderr


@pytest.mark.parametrize(
    ("trained_on", "said"),
    [
        ("meta-llama/Llama-3.1-8B", "trained on meta-llama/Llama-3.1-8B: give a GGUF of it"),
        ("a\x1b[2Jb", "trained on a\\x1b[2Jb: give a GGUF of it"),
        (None, "Missing option '--base': give the GGUF of the base that the adapter was trained"),
    ],
)
def test_base_that_nobody_knows_is_asked_for(
    trained_on: str | None, said: str, tmp_path: Path
) -> None:
    make(tmp_path, trained_on)
    for line in commands(tmp_path):
        result = qaflora(*line)
        assert result.exit_code == 2
        assert said in result.stderr
