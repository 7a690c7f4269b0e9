"""Bundles: made whole or not at all, loaded only when every file is the recorded one."""

import functools
import hashlib
import operator
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from bundles import (
    NEUTRAL,
    TinyBundle,
    add_adapter,
    bundle_json,
    make_bundle,
    make_sources,
    rewrite,
    snapshot,
)
from patience import python
from refusals import refused

from qaflora_edge import Engine, QafloraError, errors
from qaflora_edge.answering.typical import measure
from qaflora_edge.bundles import open as bundle_open
from qaflora_edge.bundles import source
from qaflora_edge.bundles.create import create_bundle
from qaflora_edge.bundles.edit import remove_adapter, set_base
from qaflora_edge.bundles.open import load_bundle, verify_bundle
from qaflora_edge.cli.bundle import describe
from qaflora_edge.config import LENSES
from qaflora_edge.formats import adapter as adapter_gguf
from qaflora_edge.formats import inputs
from qaflora_edge.formats import names as registry
from qaflora_edge.formats.gguf import GgufCursor
from qaflora_edge.formats.inputs import shown
from qaflora_edge.inference import core

Raw = dict[str, Any]


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def made(tmp_path) -> TinyBundle:
    return make_bundle(tmp_path)


@pytest.fixture
def carried(made) -> TinyBundle:
    """A bundle with its base inside; nothing is remembered of its files."""
    path = made.folder / "base.gguf"
    made.base.path.rename(path)
    rewrite(made.folder, sets("base", file="base.gguf"))
    return replace(made, base=replace(made.base, path=path))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_bundle_json_records_what_the_files_are(made) -> None:
    raw = bundle_json(made.folder)
    assert raw["format"] == "qaflora-bundle/1"
    assert raw["base"] == {
        "architecture": "llama",
        "n_layer": 3,
        "n_embd": 64,
        "n_vocab": made.base.n_vocab,
        "name": "tiny llama 0",
        "sha256": sha256(made.base.path),
        "size_bytes": made.base.path.stat().st_size,
        "file": str(made.base.path),
    }
    assert [adapter["name"] for adapter in raw["adapters"]] == ["math", "es"]
    for adapter in raw["adapters"]:
        assert adapter["sha256"] == sha256(made.folder / adapter["file"])
    assert [adapter["rank"] for adapter in raw["adapters"]] == [4, 8]
    assert set(raw["adapters"][1]["targets"]) == set(tiny.STEMS)
    assert raw["fusion"] == {
        "strategy": "qa-flora",
        "lens": "norm",
        "pool": "last",
        "prefill": "auto",
    }


def test_typical_divergences_are_the_engines(calibrated) -> None:
    inputs.checksum(calibrated.base.path)  # it was made under another cache
    bundle = load_bundle(calibrated.folder)
    with Engine(base=bundle.base_path, adapters=bundle.adapter_paths, n_ctx=512) as engine:
        measured = measure(engine.memory.current, NEUTRAL["prompts"])
    for name in ("math", "es"):
        for lens in LENSES:
            typical = bundle.known.typical[name][lens]
            np.testing.assert_allclose(typical, measured[name][lens], rtol=1e-6)
    recorded = bundle_json(calibrated.folder)["fusion"]["typical_prompts"]
    exchanged = [message["content"] for said in NEUTRAL["exchanges"] for message in said]
    texts = [*NEUTRAL["prompts"], *NEUTRAL["turns"], *exchanged]
    text = "".join(each + "\n" for each in texts)
    assert recorded == {"sha256": hashlib.sha256(text.encode()).hexdigest(), "n_prompt": len(texts)}


def test_missing_base_is_refused(tmp_path) -> None:
    assert refused(
        errors.GgufFileError, create_bundle, tmp_path / "b", tmp_path / "no.gguf", {}
    ) == (
        f"The base {tmp_path / 'no.gguf'} does not exist; give a GGUF file, the name of a "
        "model from `qaflora models` that was pulled, or a Hub reference as owner/name/file.gguf."
    )


def test_the_home_folder_is_found_behind_the_name(tmp_path, monkeypatch) -> None:
    sources = make_sources(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    create_bundle(sources.folder, "~/base.gguf", {"math": "~/peft", "es": "~/es.gguf"})
    assert verify_bundle(sources.folder).base_path == sources.base.path
    with pytest.raises(errors.InputFileError, match=r"^The adapter ~nobody0/x does not exist; "):
        create_bundle(tmp_path / "b", sources.base.path, {"a": "~nobody0/x"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (os.fsdecode(b"caf\xe9"), r"it is not a JSON object in UTF-8"),
        ("x" * 100_001, "expected a text of at most 100000 characters"),
    ],
)
def test_a_text_that_could_not_be_read_again_is_refused(tmp_path, text, message) -> None:
    sources = make_sources(tmp_path)
    options: dict[str, Any] = {"description": text}
    with pytest.raises(errors.BundleError, match=message):
        create_bundle(sources.folder, sources.base.path, {"a": sources.peft}, **options)
    assert not sources.folder.exists()
    create_bundle(sources.folder, sources.base.path, {"a": sources.peft})
    before = snapshot(sources.folder)
    with pytest.raises(
        errors.BundleError, match=message.replace("field ", r"field adapters\[1\].")
    ):
        add_adapter(sources.folder, "b", sources.peft, note={"description": text})
    assert snapshot(sources.folder) == before


def test_failed_creation_leaves_the_disk_untouched(tmp_path) -> None:
    sources = make_sources(tmp_path)
    other = tiny.write_tiny_base(tmp_path / "other.gguf", n_embd=32)
    truncated = tmp_path / "truncated.gguf"
    truncated.write_bytes(sources.adapter.path.read_bytes()[:-100])
    before = snapshot(tmp_path)
    attempts: list[tuple[type[QafloraError], Path, Path, dict[str, Any]]] = [
        (errors.AdapterMismatchError, other.path, sources.adapter.path, {}),
        (errors.AdapterMismatchError, other.path, sources.peft, {}),
        (errors.GgufFileError, sources.base.path, truncated, {}),
        (errors.InputFileError, sources.base.path, tmp_path / "missing", {}),
        (errors.InputFileError, sources.base.path, sources.peft / "adapter_model.safetensors", {}),
        (errors.StrategyError, sources.base.path, sources.peft, {"strategy": "single:no"}),
        (errors.BundleError, sources.base.path, sources.peft, {"strategy": "two-place"}),
    ]
    for error, base, adapter, options in attempts:
        adapters = {"a": sources.adapter.path, "b": adapter}
        with pytest.raises(error):
            create_bundle(sources.folder, base, adapters, **options)
        assert snapshot(tmp_path) == before
    sources.folder.mkdir()
    with pytest.raises(errors.OutputFileError, match="there is something of that name already"):
        create_bundle(sources.folder, sources.base.path, {"a": sources.adapter.path})
    assert snapshot(tmp_path) == before | {sources.folder.name: ""}


def test_texts_of_a_bundle_command_no_terminal(made) -> None:
    def record(raw: Raw) -> None:
        raw["description"] = "ends\x1b[2J\nhere"
        raw["base"]["name"] = "base \u202e"
        raw["adapters"][1]["source"] = "\x07"

    rewrite(made.folder, record)
    lines = describe(made.folder).splitlines()
    assert all(line.isprintable() for line in lines)
    assert lines[0] == r"tiny: ends\x1b[2J here"
    assert lines[2].startswith(r"base       base \u202e, 3 layers")


def test_what_is_no_bundle_is_refused(tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    for name, found in (
        ("none", "none does not exist; expected a folder with bundle.json. Give the folder of a"),
        ("empty", "bundle.json does not exist"),
    ):
        with pytest.raises(errors.BundleError, match=f"Cannot open the bundle .*: {found}"):
            load_bundle(tmp_path / name)


def test_changed_adapter_is_refused(made) -> None:
    load_bundle(made.folder)
    path = made.folder / "adapters/es.gguf"
    recorded = sha256(path)
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    before = snapshot(made.folder.parent)
    assert refused(errors.ChecksumError, load_bundle, made.folder) == (
        f"The adapter es is not the file that was recorded: {path} has the SHA-256 "
        f"{sha256(path)}, expected {recorded} as {made.folder / 'bundle.json'} says. Copy the "
        "bundle again."
    )
    assert snapshot(made.folder.parent) == before


def test_bundle_can_move_to_a_machine_with_the_pulled_base(tmp_path, monkeypatch) -> None:
    sources = make_sources(tmp_path)
    base = sources.base.path
    facts = {"description": "", "architecture": "llama", "kind": "chat", "license": "MIT"}
    facts |= {"sha256": sha256(base), "size_bytes": base.stat().st_size, "hub": None}
    model = registry.Model(name="tiny-model", file="tiny-model.gguf", **facts)
    for module in (registry, source):
        monkeypatch.setattr(module, "load_registry", lambda: {model.name: model})
    create_bundle(sources.folder, sources.base.path, {"es": sources.adapter.path})
    assert bundle_json(sources.folder)["base"]["registry"] == "tiny-model"
    models = registry.models_dir()
    models.mkdir(parents=True)
    sources.base.path.rename(models / model.file)
    assert load_bundle(sources.folder).base_path == models / model.file

    (models / model.file).unlink()
    assert refused(errors.BundleError, load_bundle, sources.folder) == (
        f"Cannot open the bundle {sources.folder}: its base (llama, {model.size_bytes} bytes) is "
        f"not here; {sources.base.path} does not exist; fetch it with `qaflora pull tiny-model`, "
        f"or name it with `qaflora bundle base {sources.folder} FILE` (its SHA-256 is "
        f"{model.sha256})."
    )


def sets(*place: str | int, **fields: Any) -> Callable[[Raw], object]:
    """Change fields of the object at a place of bundle.json."""
    return lambda raw: functools.reduce(operator.getitem, place, raw).update(fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (sets(format="other/1"), 'format is "other/1", expected "qaflora-bundle'),
        (sets("adapters", 1, name="MATH"), "adapters[1].name is"),
        (sets("base", n_layer=4), "field base.n_layer is 4, expected 3 as in"),
        (sets("base", file="a\0b"), "its base (llama"),
        (sets("fusion", strategy="single:no"), 'fusion.strategy is "single:no"'),
        (sets("fusion", strategy="centroid"), "'centroid' is not known; expected one of two-place"),
        (sets("fusion", typical={"no": {}}), "fusion.typical.no is {}, expected only adapters"),
        (
            sets("fusion", typical={"es": {"norm": [1, 2]}}),
            "fusion.typical.es.norm is a list of 2, expected 3",
        ),
    ],
)
def test_wrong_field_is_named(made, change, message) -> None:
    rewrite(made.folder, change)
    told = refused(errors.BundleError, load_bundle, made.folder)
    assert message in told
    assert str(made.folder) in told
    assert len(told) < 6000


def test_loading_begins_before_adapters_are_read(made, monkeypatch) -> None:
    steps: list[str] = []
    read = adapter_gguf.read_adapter
    monkeypatch.setattr(
        adapter_gguf, "read_adapter", lambda *a, **k: steps.append("adapter") or read(*a, **k)
    )
    load_bundle(made.folder, begin=lambda header: steps.append(header.path.name))
    assert steps[0] == made.base.path.name
    assert {*steps[1:]} == {"adapter"}


def test_broken_json_is_refused(made) -> None:
    path = made.folder / "bundle.json"
    reasons = {b"\xff{}": "'utf-8'", b" " * ((8 << 20) + 1): "it has more than 8388608 bytes"}
    for data, reason in reasons.items():
        path.write_bytes(data)
        start = f"Cannot read {path}: it is not a JSON object in UTF-8 ({reason}"
        with pytest.raises(errors.BundleError, match=re.escape(start)):
            load_bundle(made.folder)


def test_paths_stay_inside_the_bundle(made) -> None:
    rewrite(made.folder, sets("adapters", 0, file="../es.gguf"))
    with pytest.raises(errors.BundleError, match=r"inside the bundle's folder, without '..'"):
        load_bundle(made.folder)


def foreign(made: TinyBundle, kind: str) -> Path:
    """Let a bundle name a base outside of it that is the recorded one, and was never hashed."""
    other = made.folder.parent / "other.gguf"
    made.base.path.rename(other)
    file = {"absolute": str(other), "climbing": "../other.gguf", "link": "base.gguf"}[kind]
    if kind == "link":
        (made.folder / file).symlink_to(other)
    rewrite(made.folder, sets("base", file=file))
    return other


@pytest.mark.parametrize("kind", ["absolute", "climbing", "link"])
def test_a_base_elsewhere_is_read_only_where_somebody_named_it(made, monkeypatch, kind) -> None:
    """bundle.json may be anybody's: the file it names is not even looked at."""
    other = foreign(made, kind)
    file = bundle_json(made.folder)["base"]["file"]
    looked: list[str] = []
    isfile = os.path.isfile
    monkeypatch.setattr(os.path, "isfile", lambda path: looked.append(str(path)) or isfile(path))
    told = refused(errors.BundleError, load_bundle, made.folder)
    assert told == (
        f"Cannot open the bundle {made.folder}: its base (llama, {other.stat().st_size} bytes) is "
        f"not here; {shown(file)} lies outside of the bundle and was never named here; name it "
        f"with `qaflora bundle base {made.folder} FILE` (its SHA-256 is {sha256(other)})."
    )
    assert not [path for path in looked if path.endswith(file)]
    other.unlink()
    assert refused(errors.BundleError, load_bundle, made.folder) == told
    assert f"not here: {shown(file)} lies outside" in describe(made.folder)


@pytest.mark.parametrize("kind", ["absolute", "climbing", "link"])
def test_a_bundle_made_here_finds_its_base_outside(made, kind) -> None:
    other = foreign(made, kind)
    assert inputs.checksum(other)  # as create_bundle did in every version
    assert load_bundle(made.folder).base_path.samefile(other)
    os.utime(other, ns=(1, 1))
    assert load_bundle(made.folder).base_path.samefile(other)


def test_a_base_that_is_named_opens(made) -> None:
    other = foreign(made, "absolute")
    set_base(made.folder, other)
    assert load_bundle(made.folder).base_path == other


def test_a_file_of_another_size_is_not_read(carried, hashed) -> None:
    path = carried.base.path
    size = path.stat().st_size
    os.truncate(path, 300 << 30)
    assert refused(errors.ChecksumError, load_bundle, carried.folder) == (
        f"The base is not the file that was recorded: {path} has {300 << 30} bytes, expected "
        f"{size} as {carried.folder / 'bundle.json'} says. Give the file that the bundle was made "
        "with; adapters fit no other."
    )
    assert hashed == []


def test_a_file_that_is_all_hole_is_refused_at_once(carried) -> None:
    """Its size may be the recorded one, and hashing it would take minutes."""
    path = carried.base.path
    os.truncate(path, 300 << 30)
    n_stored = path.stat().st_blocks * 512
    rewrite(carried.folder, sets("base", size_bytes=300 << 30))
    assert refused(errors.InputFileError, load_bundle, carried.folder) == (
        f"Cannot read {path}: opening or reading it failed: only {n_stored} of its {300 << 30} "
        "bytes are on the disk, the others are a hole; expected a whole file. Check that it "
        "exists and that you may read it."
    )


@pytest.fixture
def hashed(monkeypatch) -> list[str]:
    """The names of files that were hashed while checking records."""
    names: list[str] = []
    original = inputs.sha256_file

    def count(path: Path) -> str:
        names.append(path.name)
        return original(path)

    monkeypatch.setattr(inputs, "sha256_file", count)
    return names


ALL = ["base.gguf", "math.gguf", "es.gguf"]


def test_a_file_that_changes_while_it_is_hashed_is_refused(carried, monkeypatch) -> None:
    original = inputs.sha256_file

    def replace_after(path: Path) -> str:
        found = original(path)
        other = path.with_suffix(".new")
        other.write_bytes(path.read_bytes())
        other.replace(path)
        return found

    monkeypatch.setattr(inputs, "sha256_file", replace_after)
    assert refused(errors.ChecksumError, load_bundle, carried.folder) == (
        f"Cannot read {carried.base.path}: it changed while it was read; expected a file that "
        "stays as it is. Try again."
    )


def test_a_file_swapped_between_check_and_use_is_refused(made, monkeypatch) -> None:
    """The engine opens by name what was checked by name."""
    path = made.folder / "adapters/es.gguf"
    other = path.with_suffix(".other")
    other.write_bytes(path.read_bytes())
    original = core.Pack

    def swap(*args: Any, **options: Any) -> Any:
        other.rename(path)
        return original(*args, **options)

    monkeypatch.setattr(core, "Pack", swap)
    with pytest.raises(errors.ChecksumError, match=f"{path}: it changed while it was read"):
        Engine(made.folder, n_ctx=64)


@pytest.mark.parametrize(("module", "step"), [(bundle_open, "check_file"), (core, "Pack")])
def test_a_bundle_that_is_edited_while_it_is_opened_is_read_again(
    made, monkeypatch, module, step
) -> None:
    adapter = tiny.write_tiny_adapter(made.folder.parent / "fr.gguf", made.base, seed=9)
    check = getattr(module, step)

    def edited(*args: Any, **options: Any) -> Any:
        monkeypatch.setattr(module, step, check)
        remove_adapter(made.folder, "es")
        add_adapter(made.folder, "fr", adapter.path)
        return check(*args, **options)

    monkeypatch.setattr(module, step, edited)
    assert Engine(made.folder, n_ctx=64).adapters == ("math", "fr")


@pytest.mark.parametrize("content", [b"", b"1", b"[" * 100_000])
def test_broken_memory_means_hashing_again(carried, hashed, content) -> None:
    load_bundle(carried.folder)
    memory = Path(os.environ["QAFLORA_CACHE"]) / "checked.json"
    assert memory.exists()
    memory.write_bytes(content)
    load_bundle(carried.folder)
    assert hashed == ALL * 2


def test_what_is_remembered_is_read_once_for_all_files(carried) -> None:
    load_bundle(carried.folder)
    inputs._parsed_memory.cache_clear()
    load_bundle(carried.folder)
    assert inputs._parsed_memory.cache_info().misses == 1


def test_a_file_is_hashed_and_its_values_are_checked_once_for_each_state(
    carried, hashed, monkeypatch
) -> None:
    checked: list[str] = []
    monkeypatch.setattr(adapter_gguf, "check_values", lambda info: checked.append(info.path.name))
    for _ in range(2):
        load_bundle(carried.folder)
        assert (hashed, sorted(checked)) == (ALL, sorted(ALL[1:]))
    verify_bundle(carried.folder)
    assert (hashed, sorted(checked)) == (ALL * 2, sorted(ALL[1:] * 2))
    for path in (carried.base.path, carried.folder / "adapters/es.gguf"):
        os.utime(path, ns=(1, 1))
    load_bundle(carried.folder)
    assert (hashed[6:], checked[4:]) == (["base.gguf", "es.gguf"], ["es.gguf"])


def test_each_file_is_parsed_once(made, monkeypatch) -> None:
    parsed: list[str] = []
    original = GgufCursor.read_header

    def count(cursor: Any) -> Any:
        parsed.append(cursor.path.name)
        return original(cursor)

    monkeypatch.setattr(GgufCursor, "read_header", count)
    with Engine(made.folder, n_ctx=64) as opened:
        opened.weights("the thing")
        opened.weights("the thing", strategy="spectr")
    assert parsed == ALL


def test_opening_a_bundle_here_loads_no_library_of_the_hub(made) -> None:
    script = "import pathlib, sys; from qaflora_edge.bundles.open import load_bundle; "
    script += "load_bundle(pathlib.Path(sys.argv[1])); print(*sys.modules)"
    loaded = set(python("-c", script, made.folder, check=True).stdout.split())
    assert not loaded & {f"qaflora_edge.{name}" for name in ("convert", "chat", "backend", "cli")}
    assert not loaded & {"huggingface_hub", "jinja2", "llama_cpp", "tqdm", "httpx"}
