"""Adapters added and removed: the bundle is the old one or the new one, never between."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import test_bundle
import tiny
from bundles import add_adapter, bundle_json, rewrite, snapshot
from refusals import refused

from qaflora_edge import Engine, QafloraError, errors
from qaflora_edge.bundles import edit
from qaflora_edge.bundles.create import create_bundle
from qaflora_edge.bundles.edit import add_adapters, calibrate, remove_adapter, set_base
from qaflora_edge.bundles.open import load_bundle, verify_bundle
from qaflora_edge.formats.adapter import read_adapter_gguf
from qaflora_edge.formats.gguf import read_gguf_header
from qaflora_edge.hub import fetch_hub
from qaflora_edge.weighing.calibration import DRAFTED, EXTENTS, LAYERS

Raw = dict[str, Any]
TYPICAL = {
    **{key: [1.0, 2.0, 3.0] for key in LAYERS},
    **{key: {"mean": -1.0, "spread": 0.5} for key in EXTENTS},
}


pytestmark = pytest.mark.usefixtures("own_cache")
made = test_bundle.made


def set_fusion(folder: Path, **fields: Any) -> None:
    rewrite(folder, lambda raw: raw["fusion"].update(fields))


def names_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_added_adapters_are_as_if_created_with_them(made, tmp_path) -> None:
    add_adapter(made.folder, "law", made.peft, outtype="f32")
    note = {"license": "MIT", "source": "S", "description": "D"}
    add_adapter(made.folder, "med", made.adapter.path, note=note)
    bundle = verify_bundle(made.folder)
    assert list(bundle.adapter_paths) == ["math", "es", "law", "med"]
    assert bundle.adapter_paths["med"].read_bytes() == made.adapter.path.read_bytes()
    law = read_adapter_gguf(bundle.adapter_paths["law"])
    assert {info.ggml_type.name for info in law.tensors.values()} == {"F32"}
    record = bundle_json(made.folder)["adapters"][3]
    assert (record["source"], record["license"], record["description"]) == ("S", "MIT", "D")
    assert names_in(made.folder) == {
        "bundle.json",
        *(f"adapters/{name}.gguf" for name in bundle.adapter_paths),
    }


def test_adding_keeps_true_measurements_and_drops_others(made, monkeypatch) -> None:
    measured: list[set[str]] = []

    @contextmanager
    def engine(base: Path, adapters: dict[str, Path], **shape: int) -> Iterator[Any]:
        measured.append(set(adapters))
        assert all(path.is_file() for path in adapters.values())
        current = SimpleNamespace(core=SimpleNamespace(call=nullcontext), names=adapters)
        yield SimpleNamespace(memory=SimpleNamespace(current=current))

    monkeypatch.setattr(edit, "measure", lambda of, *_: dict.fromkeys(of.names, TYPICAL))
    add_adapter(made.folder, "a", made.adapter.path, engine=engine, strategy="two-place")
    add_adapter(made.folder, "b", made.adapter.path, engine=engine)
    set_fusion(made.folder, typical_prompts={"sha256": "0" * 64, "n_prompt": 3})
    # the others were measured on other prompts
    add_adapter(made.folder, "c", made.adapter.path, engine=engine)
    add_adapter(made.folder, "d", made.adapter.path, strategy="qa-flora")
    assert measured == [{"math", "es", "a"}, {"b"}, {"math", "es", "a", "b", "c"}]
    assert set(load_bundle(made.folder).known.typical) == {"math", "es", "a", "b", "c"}


def test_unknown_keys_and_order_are_kept(made) -> None:
    def change(raw: Raw) -> None:
        raw["colour"] = {"a": [1, None]}
        raw["adapters"][0]["shape"] = "round"
        raw["fusion"]["more"] = "é"
        raw["fusion"]["samples"] = {"es": {"embedding": "AAAA"}}  # of development versions

    rewrite(made.folder, change)
    before = bundle_json(made.folder)
    add_adapter(made.folder, "med", made.adapter.path)
    remove_adapter(made.folder, "med")
    assert json.dumps(bundle_json(made.folder)) == json.dumps(before)


def test_an_adapter_from_the_hub_is_pinned(hub, hub_cache, made) -> None:
    files = {path.name: path.read_bytes() for path in made.peft.iterdir()}
    commit = hub.put("owner/maths", files)
    hub.put("owner/one", {"one.gguf": made.adapter.path.read_bytes()})
    hub.repos["owner/maths"].branches["v1"] = commit
    add_adapter(made.folder, "a", "owner/maths@v1")
    add_adapter(made.folder, "b", "owner/one")
    a, b = bundle_json(made.folder)["adapters"][2:]
    assert a["hub"] == a["source"] == f"owner/maths@{commit}"
    assert b["hub"] == f"owner/one/one.gguf@{hub.repos['owner/one'].branches['main']}"
    bundle = verify_bundle(made.folder)
    assert read_gguf_header(bundle.adapter_paths["a"]).name == "maths"
    math = bundle.adapter_paths["math"]
    assert (
        read_adapter_gguf(math).tensors.keys()
        == read_adapter_gguf(bundle.adapter_paths["a"]).tensors.keys()
    )


def test_failed_adding_leaves_the_bundle_as_it_was(made, tmp_path) -> None:
    other = tiny.write_tiny_base(tmp_path / "other.gguf", n_embd=32)
    foreign = tiny.write_tiny_adapter(tmp_path / "foreign.gguf", other)
    before = snapshot(tmp_path)
    attempts: list[tuple[type[QafloraError], str, Path]] = [
        (errors.AdapterMismatchError, "a", foreign.path),
        (errors.InputFileError, "a", tmp_path / "none"),
        (errors.BundleError, "a/b", made.adapter.path),
        (errors.BundleError, "ES", made.adapter.path),
    ]
    for error, name, source in attempts:
        with pytest.raises(error):
            add_adapter(made.folder, name, source)
        assert snapshot(tmp_path) == before


def test_adapters_are_added_together_or_not_at_all(made, tmp_path) -> None:
    before = snapshot(made.folder)
    pairs = [("a", made.adapter.path), ("b", tmp_path / "none")]
    with pytest.raises(errors.InputFileError):
        add_adapters(made.folder, pairs)
    assert snapshot(made.folder) == before
    pairs[1] = ("b", made.peft)
    add_adapters(made.folder, pairs, strategy="manual:a=1,b=0.5")
    bundle = verify_bundle(made.folder)
    assert list(bundle.adapter_paths) == ["math", "es", "a", "b"]
    assert bundle.known.strategy == "manual:a=1,b=0.5"


def test_a_strategy_has_to_fit_the_adapters(made, tmp_path) -> None:
    mlp = tiny.write_tiny_adapter(tmp_path / "mlp.gguf", made.base, targets=["ffn_up"]).path
    before = snapshot(made.folder)
    for strategy, engine, message in (
        ("two-place", Engine, "compares what adapters add to q, k and v, but mlp adds nothing"),
        ("calibrated", None, "was not measured of math, es, mlp. `qaflora bundle create` and"),
        ("best", Engine, "Strategy 'best' is not known"),
    ):
        with pytest.raises(QafloraError, match=message):
            add_adapter(made.folder, "mlp", mlp, strategy=strategy, engine=engine)
        assert snapshot(made.folder) == before
    add_adapter(made.folder, "mlp", mlp, strategy="qa-flora:top=3")


def test_a_file_of_another_adapter_is_not_overwritten(made) -> None:
    (made.folder / "adapters/es.gguf").rename(made.folder / "adapters/med.gguf")
    rewrite(made.folder, lambda raw: raw["adapters"][1].update(file="adapters/med.gguf"))
    assert refused(errors.BundleError, add_adapter, made.folder, "MED", made.peft) == (
        f"Cannot put an adapter MED into {made.folder}: the file adapters/MED.gguf is that of the "
        "adapter es. Choose another name."
    )
    verify_bundle(made.folder)


def test_a_removed_adapter_is_gone(made) -> None:
    set_fusion(made.folder, typical={"es": TYPICAL, "math": TYPICAL})
    remove_adapter(made.folder, "es")
    bundle = verify_bundle(made.folder)
    assert list(bundle.adapter_paths) == ["math"]
    assert set(bundle.known.typical) == {"math"}
    assert names_in(made.folder) == {"bundle.json", "adapters/math.gguf"}
    remove_adapter(made.folder, "math")
    assert load_bundle(made.folder).adapter_paths == {}


def test_a_strategy_that_names_the_adapter_must_be_replaced(made) -> None:
    set_fusion(made.folder, strategy="manual:es=1,math=0.5")
    before = snapshot(made.folder)
    assert refused(errors.BundleError, remove_adapter, made.folder, "es") == (
        f"Cannot remove the adapter es from {made.folder}: the strategy "
        "'manual:es=1,math=0.5' needs it. Choose another with --strategy."
    )
    with pytest.raises(errors.StrategyError):
        remove_adapter(made.folder, "es", strategy="single:es")
    assert snapshot(made.folder) == before
    remove_adapter(made.folder, "es", strategy="single:math")
    assert load_bundle(made.folder).known.strategy == "single:math"


def test_the_hubs_cache_is_not_changed(hub, hub_cache, made) -> None:
    files = {
        path.relative_to(made.folder).as_posix(): path.read_bytes()
        for path in made.folder.rglob("*.*")
    }
    hub.put("owner/bundle", files)
    folder = fetch_hub("owner/bundle")
    assert refused(errors.BundleError, remove_adapter, folder, "es") == (
        f"Cannot change the bundle {folder}: it lies in the Hub's cache, which other tools share. "
        "Change a copy: `cp -rL` the folder that `qaflora pull REF` prints."
    )


def test_calibrating_measures_what_is_missing(made, tmp_path) -> None:
    set_fusion(made.folder, typical={"math": {"raw": [1.0, 2.0, 3.0]}})
    assert calibrate(made.folder, Engine)
    after = bundle_json(made.folder)["fusion"]
    assert after["strategy"] == "qa-flora"  # that stays
    adapters = {"math": made.peft, "es": made.adapter.path}
    new = create_bundle(tmp_path / "new", made.base.path, adapters, engine=Engine)
    some = bundle_json(new)["fusion"]["typical"]
    needed = {name: {*EXTENTS, *DRAFTED} for name in adapters}  # all that relay needs
    assert {name: set(values) for name, values in some.items()} == needed
    assert calibrate(new, Engine)  # all that others need
    anew = bundle_json(new)["fusion"]
    for name in adapters:  # decoded next to others, a draft is rounded in other ways
        for key in DRAFTED:
            drafted = after["typical"][name].pop(key)
            assert anew["typical"][name].pop(key) == pytest.approx(drafted, abs=1e-3)
    assert anew == {**after, "strategy": "relay"}
    before = snapshot(made.folder)
    assert not calibrate(made.folder, Engine)
    assert snapshot(made.folder) == before


def test_the_base_may_lie_elsewhere(made, tmp_path) -> None:
    other = tiny.write_tiny_base(tmp_path / "other.gguf", seed=9)
    with pytest.raises(errors.ChecksumError, match="The base is not the file that was recorded"):
        set_base(made.folder, other.path)
    moved = made.base.path.rename(tmp_path / "moved.gguf")
    set_base(made.folder, moved)
    assert bundle_json(made.folder)["base"]["file"] == str(moved)
    assert load_bundle(made.folder).base_path == moved
    inside = made.folder / "base.gguf"
    shutil.copyfile(moved, inside)
    set_base(made.folder, inside)
    assert bundle_json(made.folder)["base"]["file"] == "base.gguf"
    elsewhere = made.folder.rename(tmp_path / "elsewhere")
    assert verify_bundle(elsewhere).base_path == elsewhere / "base.gguf"
