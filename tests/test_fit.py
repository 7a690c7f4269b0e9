"""`qaflora fit`: examples to weights in a bundle, and the strategy `fitted`."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from bundles import TinyBundle, bundle_json, make_bundle, snapshot
from click.testing import CliRunner
from patience import wait_until

from qaflora_edge import Engine
from qaflora_edge.bundles.card import bundle_card
from qaflora_edge.bundles.create import create_bundle
from qaflora_edge.bundles.edit import add_adapter, remove_adapter, rename_adapter
from qaflora_edge.bundles.open import describe, load_bundle, read_bundle_text
from qaflora_edge.cli import main
from qaflora_edge.errors import BundleError, OptionError, StrategyError, TaskFileError
from qaflora_edge.evaluation.tasks import read_task
from qaflora_edge.fitting.fit import choose, fit, read_examples

ITEMS = [
    {"question": "one and two", "answer": "3"},
    {"question": "a ring", "continuation": "on the thing", "answer": "x"},
    {"question": "in the rain", "answer": "an hour"},
    {"question": "no more", "answer": "there"},
]


def write_task(place: Path, items: Sequence[Any] = ITEMS, **task: Any) -> Path:
    path = place / "words.jsonl"
    lines = [*([{"task": task}] if task else []), *items]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> TinyBundle:
    return make_bundle(tmp_path_factory.mktemp("fit"))


@pytest.fixture
def folder(made_once: TinyBundle, tmp_path: Path) -> Path:
    """A bundle of a test's own."""
    return Path(shutil.copytree(made_once.folder, tmp_path / "bundle"))


@pytest.fixture
def task(tmp_path: Path) -> Path:
    return write_task(tmp_path, metric="exact")


def fusion(folder: Path) -> Any:
    return bundle_json(folder)["fusion"]


def qaflora(*words: object) -> Any:
    return CliRunner().invoke(main, [str(word) for word in words])


# the objective


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # theirs
def test_the_best_is_that_of_a_direct_reimplementation(tmp_path: Path) -> None:
    """In torch: merged weights, cross entropy, the penalty, and their minimum by another search."""
    torch = pytest.importorskip("torch")
    optimize = pytest.importorskip("scipy.optimize")
    reference = pytest.importorskip("reference")
    base = tiny.write_tiny_base(tmp_path / "base.gguf")
    folders = {
        # So weak that the objective has few valleys, and a grid meets the deepest.
        name: tiny.write_tiny_peft(tmp_path / name, base, seed=seed, strength=0.2)
        for seed, name in enumerate(("math", "es"), 2)
    }
    bundle = create_bundle(tmp_path / "b", base.path, folders, outtype="f32", calibrate=False)
    task = read_task(write_task(tmp_path, metric="exact"))
    items = [0, 1, 3]
    model = reference.Reference(base.path, folders)

    def objective(pairs: Sequence[tuple[list[int], list[int]]], weights: Sequence[float]) -> float:
        """LoRAHub's: mean cross entropy of the examples, and 0.05 times the mean of |w|."""
        layers = np.repeat(np.array(weights)[:, None], base.n_layer, axis=1)
        losses = [
            torch.nn.functional.cross_entropy(
                torch.from_numpy(logits[:-1]).double(), torch.tensor(answer)
            )
            for (_, answer), logits in zip(pairs, model.logits(pairs, layers), strict=True)
        ]
        return float(torch.stack(losses).mean()) + 0.05 * float(np.abs(weights).mean())

    with Engine(bundle, kv_type="f32", flash_attn=False) as engine:
        examples = read_examples(engine, task, items)
        assert examples.answers == ("3", "on the thing", "there")
        expected = [{"role": "user", "content": "one and two"}]
        assert list(examples.prompts[0]) == engine.chat_tokens(expected)
        pairs = [
            (list(prompt), engine._model.tokenize(text, add_special=False, parse_special=False))
            for prompt, text in zip(examples.prompts, examples.answers, strict=True)
        ]
        for weights in ([0.0, 0.0], [1.0, 0.0], [-0.7, 1.3]):
            found = examples.loss(engine, weights) + 0.05 * float(np.abs(weights).mean())
            assert found == pytest.approx(objective(pairs, weights), abs=2e-5)
        record = fit(bundle, engine, task, items, name="words", budget=120, seed=0)
    axis = np.linspace(-1.5, 1.5, 7)  # LoRAHub's range
    grid = [(a, b) for a in axis for b in axis]
    best = optimize.minimize(
        lambda weights: objective(pairs, weights),
        min(grid, key=lambda weights: objective(pairs, weights)),
        method="Nelder-Mead",
        bounds=[(-1.5, 1.5)] * 2,
        options={"fatol": 1e-5, "xatol": 1e-3},
    )
    fitted = [record["weights"][name] for name in folders]
    assert all(abs(weight) <= 1.5 for weight in fitted)
    found, base = objective(pairs, fitted), objective(pairs, [0, 0])
    # No search finds less, but for rounding; this one comes within a hundredth of the way down.
    assert best.fun - 2e-5 <= found <= best.fun + 0.01 * (base - best.fun)
    assert record["loss"]["base"] == pytest.approx(base, abs=2e-5)


# the bundle


def test_weights_are_kept_with_their_evidence(folder: Path, task: Path) -> None:
    before = fusion(folder)
    result = qaflora("fit", folder, task, "--examples", 3, "--budget", 12, "--seed", 5, "--json")
    assert result.exit_code == 0, result.stderr
    after = fusion(folder)
    assert {**after, "fitted": None} == {**before, "fitted": None}
    record = after["fitted"]["words"]
    assert json.loads(result.stdout) == record
    assert record["method"] == "lorahub"
    assert list(record["weights"]) == ["math", "es"]
    read = read_task(task)
    assert record["task"] == {
        "name": "words",
        "sha256": read.sha256,
        "items": choose(range(4), 3, 5),
    }
    assert (record["n_tried"], record["seed"]) == (12, 5)
    assert record["loss"]["fitted"] <= record["loss"]["base"]
    assert sorted(path.name for path in folder.iterdir()) == ["adapters", "bundle.json"]
    weights = ", ".join(f"{name} {weight:.2f}" for name, weight in record["weights"].items())
    loss = f"loss {record['loss']['base']:.4f} without adapters, {record['loss']['fitted']:.4f}"
    assert result.stderr == (
        f"Fitted {weights}: {loss} with them, on 3 examples. Use it with --strategy fitted:words.\n"
    )
    assert f"fitted     words: {weights}; 3 examples, loss " in describe(folder)
    card = bundle_card(read_bundle_text(folder), "owner/name")
    assert f"* `--strategy fitted:words`: words: {weights}; 3 examples, loss " in card
    with Engine(folder) as engine:
        for strategy in ("fitted", "fitted:words"):
            found = engine.weights("a", strategy=strategy)
            expected = [[weight] * 3 for weight in record["weights"].values()]
            np.testing.assert_allclose(found.weights, expected, rtol=1e-6)
            assert (found.probe_ms, found.divergence) == (0, None)


def test_of_several_one_is_named(folder: Path, task: Path) -> None:
    for name, adapters in (("one", "math"), ("two", "math,es")):
        words = ("--examples", 2, "--budget", 3, "--name", name, "--adapters", adapters)
        assert qaflora("fit", folder, task, *words).exit_code == 0
    assert list(fusion(folder)["fitted"]["one"]["weights"]) == ["math"]
    with Engine(folder) as engine:
        fits = [name for name in engine.strategies if name.startswith("fitted")]
        assert fits == ["fitted:one", "fitted:two"]
        assert engine.weights("a", strategy="fitted:one").weights.shape == (2, 3)
        for strategy, shown in (("fitted", "fitted"), ("fitted:no", "fitted:no")):
            with pytest.raises(StrategyError) as caught:
                engine.weights("a", strategy=strategy)
            assert str(caught.value) == (
                f"Strategy {shown!r} is not one of this bundle's: fitted:one, fitted:two."
            )


def test_it_needs_what_it_was_fitted_with(folder: Path, made_once: TinyBundle) -> None:
    with Engine(folder) as engine, pytest.raises(StrategyError) as caught:
        engine.weights("a", strategy="fitted")
    assert str(caught.value) == (
        "Strategy fitted needs weights that were fitted, and the bundle has none; find them with "
        "`qaflora fit DIR TASK.jsonl`."
    )
    set_fitted(folder, {"words": {"weights": {"math": 0.5, "es": 0.0}}})
    add_adapter(folder, "law", made_once.adapter.path, calibrate=False)
    with Engine(folder) as engine:
        weights = engine.weights("a", strategy="fitted").weights
        np.testing.assert_array_equal(weights[:, 0], np.array([0.5, 0, 0], np.float32))
        one = engine.weights("a", strategy="fitted", adapters=["math"])  # es weighs nothing
        np.testing.assert_array_equal(one.weights, np.full((1, 3), 0.5, np.float32))
        with pytest.raises(StrategyError) as caught:
            engine.weights("a", strategy="fitted", adapters=["es", "law"])
    assert str(caught.value) == (
        "Strategy fitted was fitted with math, and in use are es, law; use all that it was fitted "
        "with, or fit again with `qaflora fit --adapters`."
    )


def set_fitted(folder: Path, fitted: Any) -> None:
    path = folder / "bundle.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    raw["fusion"]["fitted"] = fitted
    path.write_text(json.dumps(raw), encoding="utf-8")


def test_renaming_and_removing_an_adapter(folder: Path) -> None:
    set_fitted(
        folder,
        {
            "both": {"weights": {"math": 0.5, "es": -1}},
            "one": {"weights": {"math": 1, "es": 0.0}, "method": "by hand"},
        },
    )
    raw = bundle_json(folder)
    raw["fusion"]["strategy"] = "fitted:both"
    (folder / "bundle.json").write_text(json.dumps(raw), encoding="utf-8")
    rename_adapter(folder, "math", "sums")
    before = snapshot(folder)
    with pytest.raises(BundleError, match="the strategy 'fitted:both' needs it"):
        remove_adapter(folder, "es")
    with pytest.raises(BundleError, match="the strategy 'fitted' needs it"):
        remove_adapter(folder, "sums", strategy="fitted")
    assert snapshot(folder) == before
    assert fusion(folder)["fitted"]["both"] == {"weights": {"sums": 0.5, "es": -1}}
    remove_adapter(folder, "es", strategy="fitted:one")
    assert fusion(folder)["fitted"] == {"one": {"weights": {"sums": 1}, "method": "by hand"}}
    load_bundle(folder)


@pytest.mark.parametrize(
    ("fitted", "message"),
    [
        ({"w": {"weights": {"no": 1}}}, "field fusion.fitted.w.weights.no is 1, expected only "),
        ({"w": {"weights": {"es": "1"}}}, 'is "1", expected a number from -1000 to 1000'),
        ({"w": {}}, "field fusion.fitted.w.weights is missing, expected an object"),
        ({"a b": {"weights": {}}}, "expected an object whose names are 1 to 64 letters, digits"),
    ],
)
def test_a_bundle_with_a_wrong_fit_names_the_field(folder: Path, fitted: Any, message: str) -> None:
    set_fitted(folder, fitted)
    with pytest.raises(BundleError) as caught:
        load_bundle(folder)
    assert message in str(caught.value)


# examples


def test_examples_are_chosen_by_chance_and_in_order() -> None:
    items = range(1, 100, 2)
    chosen = choose(items, 20, 1)
    assert chosen == sorted(set(chosen)) == choose(items, 20, 1)
    assert len(chosen) == 20
    assert set(chosen) < set(items)
    assert choose(items, 20, 2) != chosen
    assert choose(items, 50, 3) == list(items)
    with pytest.raises(OptionError, match="51 examples are to be taken, and there are 50;"):
        choose(items, 51, 1)


def test_what_is_answered_is_what_the_task_says(folder: Path, tmp_path: Path) -> None:
    choice = {"question": "q", "choices": ["no", "yes"], "answer": 1}
    task = read_task(write_task(tmp_path, [choice], metric="choice", choice_template="{letter}."))
    code = {"question": "q", "test": "assert True", "entry_point": "f"}
    with Engine(folder) as engine:
        assert read_examples(engine, task, [0]).answers == ("B.",)
        number = read_task(write_task(tmp_path, [{"question": "q", "answer": 7}]))
        assert read_examples(engine, number, [0]).answers == ("7",)
        several = [{"question": "q", "answer": ["Madrid", "la villa"]}]
        words = read_task(write_task(tmp_path, several))
        assert read_examples(engine, words, [0]).answers == ("Madrid",)
        written = {**code, "continuation": "def f(): ..."}
        task = read_task(write_task(tmp_path, [written, code], metric="code"))
        assert read_examples(engine, task, [0]).answers == ("def f(): ...",)
        with pytest.raises(TaskFileError) as caught:
            read_examples(engine, task, [0, 1])
    assert str(caught.value) == (
        f"Cannot fit to {tmp_path / 'words.jsonl'}, line 3: its field continuation is missing, "
        "expected the text that should be answered, for a task of code does not say it otherwise. "
        "Add it."
    )


# what goes wrong


@pytest.mark.slow
def test_a_search_that_is_killed_goes_on(folder: Path, task: Path) -> None:
    words = ("--examples", "4", "--budget", "400", "--seed", "1")
    whole = Path(shutil.copytree(folder, folder.with_name("whole")))
    with Engine(whole, strategy="base") as engine:
        read = read_task(task)
        expected = fit(whole, engine, read, [0, 1, 2, 3], name="words", budget=30, seed=1)
    code = "import sys; from qaflora_edge.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "fit", str(folder), str(task), *words]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)

    def lines() -> list[str]:
        return [
            line for path in folder.glob(".fit-*") for line in path.read_text().split("\n")[:-1]
        ]

    wait_until(lambda: len(lines()) > 12)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = len(lines())
    assert "fitted" not in fusion(folder)
    assert load_bundle(folder)
    computed = []
    with Engine(folder, strategy="base") as engine:
        score = engine.score

        def counted(*args: Any, **keywords: Any) -> Any:
            computed.append(keywords["weights"])
            return score(*args, **keywords)

        engine.score = counted  # type: ignore[method-assign]
        record = fit(folder, engine, read_task(task), [0, 1, 2, 3], name="words", budget=30, seed=1)
    assert len(computed) == max(0, 30 - (before - 1))
    assert {**record, "date": ""} == {**expected, "date": ""}
    assert not list(folder.glob(".fit-*"))


def test_adapters_that_change_meanwhile_are_noticed(
    folder: Path, task: Path, made_once: TinyBundle
) -> None:
    read = read_task(task)
    with Engine(folder, strategy="base") as engine:

        def change(search: Any) -> None:
            if len(search.tried) == 2:
                remove_adapter(folder, "es")
                add_adapter(folder, "es", made_once.peft, calibrate=False)

        with pytest.raises(BundleError, match="its adapters are not those that it was fitted with"):
            fit(folder, engine, read, [0, 1], name="w", budget=3, seed=0, tell=change)
    assert "fitted" not in fusion(folder)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--name", "a b"), 1, "The name 'a b' cannot be used for a fit; expected 1 to 64 letters"),
        (("--examples", 5), 1, "5 examples are to be taken, and there are 4; expected at most as"),
        (("--half", "test", "--examples", 3), 1, "3 examples are to be taken, and there are 2;"),
        (("--adapters", "law"), 1, "The adapter 'law' is not loaded; expected names out of: math"),
        (("--budget", 1), 2, "Invalid value for '--budget'"),
        (("--method", "adam"), 2, "Invalid value for '--method'"),
    ],
)
def test_what_cannot_be_done_changes_nothing(
    folder: Path, task: Path, words: Sequence[object], code: int, message: str
) -> None:
    before = snapshot(folder)
    result = qaflora("fit", folder, task, "--examples", 2, "--budget", 2, *words)
    assert (result.exit_code, result.stdout) == (code, "")
    assert message in result.stderr
    assert snapshot(folder) == before


def test_an_example_that_is_too_long_is_named(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"question": "a" * 3000, "answer": "b"}) + "\n")
    result = qaflora("fit", folder, path, "--examples", 1, "--budget", 2, "--ctx", 64)
    assert f"Cannot fit to {path}, line 1: The prompt has " in result.stderr


def test_a_base_alone_cannot_be_fitted(made_once: TinyBundle, task: Path) -> None:
    result = qaflora("fit", made_once.base.path, task)
    assert result.exit_code == 1
    assert "it is no bundle's folder, expected one that can be changed." in result.stderr
    assert os.path.isfile(made_once.base.path)
