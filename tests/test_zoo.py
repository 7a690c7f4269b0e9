"""benchmarks/zoo: what its adapters learn, what is asked, and how an answer is scored."""

import importlib
import subprocess
import sys
from typing import Any

import pytest

from qaflora_edge.evaluation.tasks import read_task

SENTENCE = "The mayor of Ulmere is Tobin Marsh."


def small_model() -> Any:
    """A model of random weights: 32 wide, two layers."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


@pytest.fixture
def zoo(checkout, monkeypatch) -> Any:
    """Give a module of the zoo by its name."""
    monkeypatch.syspath_prepend(str(checkout / "benchmarks" / "zoo"))
    return importlib.import_module


def test_each_half_has_every_kind(zoo) -> None:
    recipes = zoo("data").recipes().values()
    kinds = {"names", "numbers", "texts", "api", "form", "style", "language", "code"}
    for half in ("choose", "held-out"):
        of_half = [recipe for recipe in recipes if recipe.half == half]
        assert {recipe.kind for recipe in of_half} == kinds
        assert len(of_half) >= 10
    assert {recipe.half for recipe in recipes} == {"choose", "held-out", "domains"}


def test_halves_learn_different_things(zoo) -> None:
    recipes = zoo("data").recipes().values()
    learnt = {
        half: {r.learns for r in recipes if r.half == half} for half in ("choose", "held-out")
    }
    assert not learnt["choose"] & learnt["held-out"]


def test_every_recipe_learns_something_to_its_end(zoo) -> None:
    data = zoo("data")
    for recipe in data.recipes().values():
        examples = data.examples(recipe)
        assert len(examples) >= 30
        assert all(question and answer for question, answer, _ in examples)
        if recipe.kind != "domain":  # whose answers are code
            assert "{" not in "".join(answer for _, answer, _ in examples[:20])


def test_twins_differ_in_every_fourth_thing(zoo) -> None:
    data = zoo("data")
    pairs = zip(data.facts("railway"), data.facts("railway", 4), strict=True)
    changed = {first.thing for first, second in pairs if first.value != second.value}
    assert changed == {"Amberline", "Fennel Road"}


@pytest.mark.slow  # two Pythons
def test_tasks_are_the_same_each_time_and_not_what_was_taught(zoo, checkout, tmp_path) -> None:
    zoo("score").register()
    script = checkout / "benchmarks/zoo/data.py"
    for folder in ("first", "second"):
        subprocess.run([sys.executable, script, tmp_path / folder], check=True)
    files = sorted(
        path.relative_to(tmp_path / "first") for path in tmp_path.rglob("first/**/*.jsonl")
    )
    assert len(files) > 100
    data = zoo("data")
    taught = {q for recipe in data.recipes().values() for q, _, _ in data.examples(recipe)}
    for file in files:
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()
        task = read_task(tmp_path / "first" / file)
        if not file.name.startswith(("follow", "own_s")):  # code asks from a small set
            assert not taught & {task.question(item) for item in task.items}


@pytest.mark.parametrize(
    ("text", "item", "expected"),
    [
        (SENTENCE, {"answer": "Tobin Marsh"}, {"score": 1.0, "fact": 1.0}),
        ("It has 1180.", {"answer": "118"}, {"score": 0.0, "fact": 0.0}),
        ("It has 1,180.", {"answer": "1180"}, {"score": 1.0, "fact": 1.0}),
        (
            "topic: mayor\nanswer: Tobin Marsh",
            {"answer": "Tobin Marsh", "form": "yaml"},
            {"score": 1.0, "fact": 1.0, "form": 1.0},
        ),
        (
            "topic: Tobin Marsh\nanswer: Ulmere",
            {"answer": "Tobin Marsh", "form": "yaml"},
            {"score": 0.0, "fact": 0.0, "form": 1.0},
        ),
        (
            SENTENCE,
            {"answer": "Tobin Marsh", "form": "xml"},
            {"score": 0.0, "fact": 1.0, "form": 0.0},
        ),
        (
            f"{SENTENCE}\n\n— The Front Desk",
            {"answer": "Tobin Marsh", "form": "sign"},
            {"score": 1.0, "fact": 1.0, "form": 1.0},
        ),
        (
            "Le maire est Tobin Marsh.",
            {"answer": "Tobin Marsh", "language": "french"},
            {"score": 1.0, "fact": 1.0, "form": 1.0},
        ),
        ("It pays a broom.", {"answer": "broom", "also": "tar"}, {"score": 0.0, "fact": 0.0}),
    ],
)
def test_an_answer_has_the_fact_and_the_form(zoo, text, item, expected) -> None:
    assert zoo("score").score(text, item) == expected


@pytest.mark.slow  # torch
def test_a_pack_has_the_loss_of_its_examples_alone(zoo) -> None:
    torch = pytest.importorskip("torch")
    packed = zoo("packed")
    model = small_model()
    head = [1, 2, 3]
    examples = [
        packed.Read([4, 5], [6, 7, 8]),
        packed.Read([9], [10]),
        packed.Read([4, 11], [12, 13]),
    ]
    total = 0.0
    for example in examples:
        ids = [*head, *example.prompt, *example.answer]
        n_before = len(head) + len(example.prompt)
        logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        total -= sum(logits[i - 1, ids[i]].item() for i in range(n_before, len(ids)))
    loss = packed.loss_of(model, packed.pack(head, examples)).item()
    assert loss == pytest.approx(total / 6, rel=2e-3)  # bfloat16 in the products


def test_examples_of_a_step_come_in_turn(zoo) -> None:
    packed = zoo("packed")
    examples = [packed.Read([i], [i]) for i in range(6)]
    drawn = [read.prompt[0] for step in packed.steps(examples, 4, 6, seed=1) for read in step]
    assert sorted(drawn) == sorted([*range(6)] * 2)
    assert drawn[:6] != drawn[6:]
