"""Adapters without --base. A base with adapters and without a bundle."""

import json
import re
from pathlib import Path
from unittest.mock import Mock

import pytest
import tiny
from bundles import TinyBundle, make_bundle, make_sources, qaflora

from qaflora_edge.formats.bundle import read_bundle_text

MODEL = "smollm2-135m-instruct"
pytestmark = pytest.mark.usefixtures("own_cache")


def make(place: Path, trained_on: str | None) -> TinyBundle:
    made = make_sources(place)
    config = {"base_model_name_or_path": trained_on}
    tiny.write_tiny_peft(place / "named", made.base, config=config)
    return made


@pytest.mark.parametrize(
    ("trained_on", "said"),
    [
        ("meta-llama/Llama-3.1-8B", "give a GGUF of meta-llama/Llama-3.1-8B, in any"),
        ("a\x1b[2Jb", "give a GGUF of a\\x1b[2Jb, in any"),
        (None, "Missing option '--base': give a GGUF of the base that the adapter was trained"),
    ],
)
def test_base_is_asked_for_by_its_name(trained_on, said, tmp_path) -> None:
    make(tmp_path, trained_on)
    for line in (
        ["convert", tmp_path / "named", "-o", tmp_path / "out.gguf"],
        ["bundle", "create", tmp_path / "b", "--adapter", f"m={tmp_path / 'named'}"],
    ):
        result = qaflora(*line)
        assert result.exit_code == 2
        assert said in result.stderr


def test_a_base_with_adapters_is_weighed_without_a_bundle(tmp_path, own_cache) -> None:
    made = make_sources(tmp_path)
    own = ["--adapter", made.peft, "--adapter", f"e={made.adapter.path}"]
    first = qaflora("weights", made.base.path, "the thing", "--json", *own)
    assert first.exit_code == 0, first.stderr
    assert first.stderr.startswith(
        "To keep these adapters, measured for relay: qaflora bundle create my-bundle --base "
        f"{made.base.path} --adapter peft={made.peft} --adapter e={made.adapter.path}\n"
    )
    cached = list((own_cache / "mixes").rglob("bundle.json"))
    states = [path.stat() for path in cached]
    qaflora("bundle", "create", tmp_path / "b", "--base", made.base.path, *own, "--no-calibrate")
    kept = qaflora("weights", tmp_path / "b", "the thing", "--json", "--strategy", "spectr")
    shown, expected = json.loads(first.stdout), json.loads(kept.stdout)
    assert (shown["adapters"], shown["strategy"]) == (["peft", "e"], "spectr")
    assert shown["weights"] == expected["weights"]
    answer = qaflora("run", made.base.path, "the thing", "-n", 4, *own)
    assert re.search(r"\n\[peft ×[\d.]+ · e ×[\d.]+; ", answer.stderr)
    assert [path.stat() for path in cached] == states  # converted once
    tiny.write_tiny_peft(made.peft, made.base, rank=2)
    qaflora("weights", made.base.path, "the thing", *own)
    assert len(list((own_cache / "mixes").rglob("bundle.json"))) == 2


def test_a_first_run_that_was_ended_is_begun_again(tmp_path, own_cache, monkeypatch) -> None:
    made = make_sources(tmp_path)
    words = ["weights", made.base.path, "the thing", "--json", "--adapter", made.peft]
    with monkeypatch.context() as patched:
        ended = Mock(side_effect=KeyboardInterrupt)
        patched.setattr("qaflora_edge.bundles.create.set_default", ended)
        assert qaflora(*words).exit_code == 130
    (made.peft / "train.log").write_text("a log is no part of an adapter")
    (made.peft / "latest").symlink_to("nowhere")
    assert json.loads(qaflora(*words).stdout)["strategy"] == "spectr"
    (made.peft / "train.log").write_text("and it grows")
    qaflora(*words)
    assert len(list((own_cache / "mixes").rglob("bundle.json"))) == 1


def test_adapters_without_a_shared_kind_are_weighed_by_qa_flora(tmp_path) -> None:
    made = make_sources(tmp_path)
    for name in ("q_proj", "v_proj"):
        config = {"target_modules": [name]}
        tiny.write_tiny_peft(tmp_path / name, made.base, targets=(name,), config=config)
    own = ["--adapter", tmp_path / "q_proj", "--adapter", tmp_path / "v_proj"]
    shown = json.loads(qaflora("weights", made.base.path, "the thing", "--json", *own).stdout)
    assert shown["strategy"] == "qa-flora"


def test_adapters_go_with_one_base(tmp_path) -> None:
    made = make_bundle(tmp_path)
    for line in (("run", made.folder), ("serve", made.base.path, made.base.path)):
        result = qaflora(*line, "--adapter", made.peft)
        assert result.exit_code == 2
        assert "--adapter goes with one base" in result.stderr
    added = qaflora("bundle", "add", made.folder, made.peft, "--adapter", f"x={made.peft}")
    assert added.exit_code == 0, added.stderr
    names = [each.name for each in read_bundle_text(made.folder).adapters]
    assert names == ["math", "es", "peft", "x"]


@pytest.mark.parametrize(
    ("trained_on", "base"), [("owner/peft", "BASE.gguf"), ("x/SmolLM2-135M-Instruct", MODEL)]
)
def test_an_adapter_in_place_of_a_bundle_tells_its_base(tmp_path, trained_on, base) -> None:
    make(tmp_path, trained_on)
    result = qaflora("run", tmp_path / "named", "hi")
    assert result.exit_code == 1
    assert f"it is an adapter for {trained_on}, expected a bundle" in result.stderr
    assert f"qaflora run {base} --adapter {tmp_path / 'named'} PROMPT" in result.stderr
