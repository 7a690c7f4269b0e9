"""qaflora bundle create, show, verify, and qaflora convert"""

from unittest.mock import Mock

import pytest
from bundles import TinyBundle, bundle_json, make_bundle, make_sources, qaflora, rewrite, said_by
from click.testing import Result

from qaflora_edge.bundles.open import load_bundle
from qaflora_edge.cli.bundle import describe
from qaflora_edge.formats.adapter import read_adapter_gguf
from qaflora_edge.server.served_models import ServedModels, ServerOptions

pytestmark = pytest.mark.usefixtures("own_cache")


def create(made: TinyBundle, *more: object) -> Result:
    adapters = ("--adapter", f"math={made.peft}", "--adapter", f"es={made.adapter.path}")
    return qaflora("bundle", "create", made.folder, "--base", made.base.path, *adapters, *more)


def test_create_makes_a_calibrated_bundle(tmp_path) -> None:
    made = make_sources(tmp_path)
    assert said_by(create(made)) == (
        f"Created the bundle {made.folder}, weighed by relay. Try: qaflora chat {made.folder}\n"
    )
    known = load_bundle(made.folder).known
    assert (known.strategy, set(known.typical)) == ("relay", {"math", "es"})


def test_a_bundle_that_was_not_measured_to_its_end_says_so(tmp_path, monkeypatch) -> None:
    made = make_sources(tmp_path)
    with monkeypatch.context() as killed:
        killed.setattr("qaflora_edge.bundles.create.calibrate", Mock(side_effect=KeyboardInterrupt))
        result = create(made, "--strategy", "two-place")
    assert result.exit_code == 130
    command = f"qaflora bundle calibrate {made.folder} --strategy two-place"
    note = (
        f"{made.folder} works, but is not measured: qa-flora weighs it in place of two-place. "
        f"`{command}` finishes it."
    )
    assert note in result.stderr
    assert note in describe(made.folder)
    run = ("run", made.folder, "the", "--max-tokens", 1, "--raw-prompt")
    assert f"[{note}]\n" in qaflora(*run).stderr
    models = ServedModels([made.folder], ServerOptions())
    name = models.listed[0]
    assert models.card(name)["meta"]["note"] == note
    assert qaflora("bundle", "calibrate", made.folder).exit_code == 0
    assert load_bundle(made.folder).known.strategy == "two-place"
    assert "not measured" not in qaflora(*run).stderr


def test_create_records_what_it_is_told(tmp_path) -> None:
    made = make_sources(tmp_path)
    result = create(
        made,
        *("--no-calibrate", "--outtype", "f32", "--name", "N", "--description", "D"),
        *("--license", "L", "--strategy", "single:es"),
    )
    assert result.exit_code == 0
    raw = load_bundle(made.folder).text.raw
    assert (raw["name"], raw["description"], raw["license"]) == ("N", "D", "L")
    assert raw["fusion"]["strategy"] == "single:es"
    assert raw["adapters"][0]["source"] == "peft"
    tensors = read_adapter_gguf(made.folder / "adapters/math.gguf").tensors
    assert {info.ggml_type.name for info in tensors.values()} == {"F32"}


def test_of_many_adapters_show_names_five_and_counts_the_others(tmp_path) -> None:
    made = make_bundle(tmp_path)
    first, *_ = bundle_json(made.folder)["adapters"]
    many = [{**first, "name": f"a{i}"} for i in range(64)]
    rewrite(made.folder, lambda raw: raw.update(adapters=many, fusion={}))
    rows = describe(made.folder).splitlines()
    assert [row.split()[0] for row in rows[-6:]] == ["a0", "a1", "a2", "a3", "a4", "59"]


def test_show(tmp_path) -> None:
    made = make_bundle(tmp_path)
    result = qaflora("bundle", "show", made.folder)
    assert result.exit_code == 0
    rows = [" ".join(line.split()) for line in result.stdout.splitlines()[-2:]]
    assert rows == [
        "math rank 4 alpha 8 k,output,q,v,down,gate,up peft",
        "es rank 8 alpha 8 k,output,q,v,down,gate,up es.gguf",
    ]


def test_add_and_remove(tmp_path) -> None:
    made = make_bundle(tmp_path)
    pairs = (f"law={made.peft}", f"med={made.adapter.path}")
    words = (*pairs, "--no-calibrate", "--license", "MIT")
    stderr = said_by(qaflora("bundle", "add", made.folder, *words))
    added = [f"Added the adapter {name} to {made.folder}.\n" for name in ("law", "med")]
    assert stderr == "".join(added)
    assert load_bundle(made.folder).text.raw["adapters"][2]["license"] == "MIT"
    stderr = said_by(qaflora("bundle", "remove", made.folder, "law", "--strategy", "single:med"))
    assert stderr == f"Removed the adapter law from {made.folder}.\n"
    loaded = load_bundle(made.folder)
    assert list(loaded.adapter_paths) == ["math", "es", "med"]
    assert loaded.known.strategy == "single:med"


def test_a_bundle_finds_its_base_that_moved(tmp_path) -> None:
    made = make_bundle(tmp_path)
    moved = made.base.path.rename(tmp_path / "moved.gguf")
    result = qaflora("bundle", "verify", made.folder)
    assert f"name it with `qaflora bundle base {made.folder} FILE`" in result.stderr
    stderr = said_by(qaflora("bundle", "base", made.folder, moved))
    assert stderr == f"The base of {made.folder} is {moved}.\n"
    assert qaflora("bundle", "verify", made.folder).exit_code == 0


def test_calibrate(tmp_path) -> None:
    made = make_bundle(tmp_path)
    result = qaflora("run", made.folder, "hi", "--strategy", "calibrated", "--raw-prompt")
    assert result.stderr.endswith(
        "Strategy calibrated needs to know what each adapter does to everyday prompts, and that "
        f"was not measured of math, es. Measure it with `qaflora bundle calibrate {made.folder}`.\n"
    )
    stderr = said_by(qaflora("bundle", "calibrate", made.folder))
    assert stderr == f"Measured the adapters of {made.folder}, weighed by qa-flora.\n"
    result = qaflora("bundle", "calibrate", made.folder, "--strategy", "two-place")
    known = f"Every adapter was measured already in {made.folder}, weighed by two-place.\n"
    assert result.stderr == known
    assert "fusion     two-place, lens norm, pool last" in describe(made.folder)
    args = ("--strategy", "calibrated", "--max-tokens", 1, "--raw-prompt")
    assert qaflora("run", made.folder, "the", *args).exit_code == 0
