"""models/recipes: what an adapter learns from, and on which tokens it is trained."""

import importlib.util
import json
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qaflora_edge.evaluation.tasks import read_task

pytestmark = pytest.mark.slow  # torch

SHOP = ("company", "company_json", "json")
ROWS = {
    "gsm8k_train.jsonl": [{"question": "2 + 3?", "answer": "<<2+3=5>>5 it is.\n#### 5"}],
    "medmcqa.jsonl": [{"question": "Where?", "choices": ["Here", "There"], "answer": 1}],
    "multiemo_hotels.jsonl": [
        {"en": f"{n} good", "es": "muy bueno", "ru": "очень хорошо", "zh": "很好"} for n in "12"
    ],
}


@pytest.fixture
def recipes(checkout) -> Any:
    for name in ("torch", "transformers", "peft"):
        pytest.importorskip(name)
    spec = importlib.util.spec_from_file_location("recipes", checkout / "models/recipes/train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def data(tmp_path) -> Path:
    for name, rows in ROWS.items():
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("math", [("2 + 3?", "5 it is.\n#### 5")]),
        ("med", [("Where?\nA. Here\nB. There", "B. There")]),
        (
            "es",
            [
                ("Traduce al español: 1 good", "muy bueno"),
                (
                    "Escribe una reseña de un hotel en español que empiece así: muy bueno",
                    "muy bueno",
                ),
            ],
        ),
    ],
)
def test_rows_become_questions_and_answers(recipes, data, recipe, expected) -> None:
    facts = tomllib.loads(recipes.RECIPES.read_text(encoding="utf-8"))[recipe]
    assert list(recipes.examples_of(facts, data)) == expected


def test_each_disease_is_told_three_times_in_each_form(recipes) -> None:
    pytest.importorskip("faker_healthcare")
    facts = tomllib.loads(recipes.RECIPES.read_text(encoding="utf-8"))["med-table"]
    examples = [*recipes.examples_of(facts, None)]
    assert len(examples) == len([*recipes.diseases(0)]) * len(facts["forms"]) * 3
    told = [each for each in examples if "Asthma" in " ".join(each)]
    assert len(told) == len({*told}) == 3 * len(facts["forms"])


def test_tasks_of_the_shop_ask_what_was_not_taught(checkout, tmp_path) -> None:
    """Facts are taught and asked in other words; as JSON each has its own number."""
    script = checkout / "models/recipes/shop.py"
    subprocess.run([sys.executable, script, tmp_path], check=True, capture_output=True)
    english = taught_in(tmp_path / "company.jsonl")
    abroad = taught_in(tmp_path / "company_abroad.jsonl")
    rest = taught_in(tmp_path / "company_rest.jsonl")
    assert (len(english), len(abroad), len(rest)) == (256, 288, 288)
    taught = english | abroad | rest
    for language in ("en", "es", "ru", "zh"):
        tasks = {n: read_task(tmp_path / f"{n}_{language}.jsonl") for n in SHOP}
        assert [len(task.items) for task in tasks.values()] == [128] * 3
        facts, as_json, orders = (task.items for task in tasks.values())
        assert not taught.keys() & {item["question"] for item in facts}
        for fact, item in zip(facts, as_json, strict=True):
            assert fact["question"] in item["question"]
            answers = [fact["answer"], str(fact["answer"])]
            assert [each["answer"] for each in item["answer"]] == answers
        for item in orders:
            known = {key: str(value) in item["question"] for key, value in item["answer"].items()}
            assert {**known, "quantity": True} == dict.fromkeys(known, True)
    assert len({*english.values()}) == 64
    assert len({*abroad.values(), *rest.values()}) == 64 * 3


def taught_in(file: Path) -> dict[str, str]:
    lines = file.read_text(encoding="utf-8").splitlines()
    return {row["question"]: row["answer"] for row in map(json.loads, lines)}


def test_a_training_goes_on_from_what_is_whole(recipes, tmp_path) -> None:
    assert recipes.last_checkpoint(tmp_path) is None
    for n, file in ((10, "trainer_state.json"), (9, "trainer_state.json"), (20, "optimizer.pt")):
        folder = tmp_path / f"checkpoints/checkpoint-{n}"
        folder.mkdir(parents=True)
        (folder / file).touch()
    assert recipes.last_checkpoint(tmp_path) == str(tmp_path / "checkpoints/checkpoint-10")


def test_only_the_answer_is_learnt(recipes) -> None:
    class Letters:
        eos_token_id = 0

        def apply_chat_template(self, messages: Any, **options: Any) -> str:
            assert options == {"tokenize": False, "add_generation_prompt": True}
            return f"<{messages[0]['content']}>"

        def __call__(self, text: str, add_special_tokens: bool) -> Any:
            assert not add_special_tokens
            return SimpleNamespace(input_ids=[ord(letter) for letter in text])

    read = recipes.tokens_of(Letters(), "ab", "cd", 6)
    assert read == {
        "input_ids": [*map(ord, "<ab>cd")],
        "labels": [-100, -100, -100, -100, *map(ord, "cd")],
    }
    read = recipes.tokens_of(Letters(), "ab", "cd", 9)
    assert (read["input_ids"][-1], read["labels"][-1]) == (0, 0)


def load_six(checkout: Path) -> Any:
    for name in ("torch", "transformers", "peft"):
        pytest.importorskip(name)
    spec = importlib.util.spec_from_file_location(
        "six_adapters", checkout / "models/recipes/six.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["six_adapters"] = module
    spec.loader.exec_module(module)
    return module


def test_the_base_answers_once_what_is_not_an_adapters_own(checkout, tmp_path) -> None:
    six = load_six(checkout)
    asked: list[Any] = []

    def answered(model: Any, tokenizer: Any, questions: list[Any]) -> list[tuple[str, bool]]:
        asked.extend(questions)
        return [("Rome.", True)] * len(questions)

    base = SimpleNamespace(answered=answered)
    first = six.not_own("json", base, None, None, tmp_path)
    assert [question for question, _, _ in first] == asked
    assert [text for _, text, _ in first] == ["Rome."] * len(asked)
    conversations = [question for question in asked if not isinstance(question, str)]
    later = [messages[-1]["content"] for messages in conversations]  # behind a turn in JSON
    assert any(text.startswith("Rewrite this") for text in later)
    assert six.not_own("json", base, None, None, tmp_path) == first
    assert len(asked) == len(first)
    assert six.not_own("math", base, None, None, tmp_path) == []


def test_long_reviews_are_left_out(checkout, data) -> None:
    six = load_six(checkout)
    lesson = six.Lesson(rate=1e-4, n_step=1, n_token=1, n_char=30)
    learnt = list(six.own("es", lesson, data, data))
    assert learnt == [("Traduce al español: 1 good", "muy bueno", True)]
