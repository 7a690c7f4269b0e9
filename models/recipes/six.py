"""Train the six adapters of demo over a base, one after another, resumable by adapter.

    python models/recipes/shop.py shop
    python models/recipes/six.py --base BASE --gguf NAME --data FOLDER --shop shop OUT [NAME ...]

Many short examples lie in a step (see benchmarks/zoo/packed.py). `company` and `json` also learn
what is not theirs: near questions of others.toml, as the base itself answers them, greedily.
OUT gets peft/NAME, adapters/NAME.gguf and a line of STATUS for each. What is there stays.
"""

import argparse
import importlib.util
import json
import os
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

HERE = Path(__file__).parent
ZOO = HERE.parents[1] / "benchmarks" / "zoo"
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj")
RANK = 8


@dataclass(frozen=True)
class Lesson:
    """How an adapter is trained.

    rate      highest learning rate
    n_step    steps
    n_token   tokens a step, about
    n_char    longest question or answer, characters
    n_own     examples of its own, at most
    """

    rate: float
    n_step: int
    n_token: int
    n_char: int = 2000
    n_own: int = 400


LESSONS = {
    "company": Lesson(8e-4, 100, 320),
    "json": Lesson(4e-4, 30, 320, n_own=170),
    "es": Lesson(4e-4, 8, 400, n_char=450),
    "math": Lesson(3e-4, 14, 640, n_char=700),
    "ru": Lesson(4e-4, 8, 400, n_char=450),
    "zh": Lesson(4e-4, 8, 400, n_char=450),
}


def main() -> int:
    """Train what is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", required=True, help="GGUF, or folder of transformers")
    parser.add_argument("--gguf", required=True, help="registry's name of the base, for conversion")
    parser.add_argument("--data", type=Path, required=True, help="folder with the recipes' files")
    parser.add_argument("--shop", type=Path, required=True, help="what shop.py has written")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("names", nargs="*", metavar="NAME")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
    sys.path.insert(0, str(ZOO))  # for what its trainer imports
    zoo = module("zoo_train", ZOO / "train.py")
    (args.out / "adapters").mkdir(parents=True, exist_ok=True)
    model, tokenizer = zoo.load(args.base)
    for name in args.names or LESSONS:
        if (args.out / "adapters" / f"{name}.gguf").exists():
            continue
        lesson = LESSONS[name]
        learnt = list(islice(own(name, lesson, args.data, args.shop), lesson.n_own))
        learnt += not_own(name, zoo, model, tokenizer, args.out)
        tuned = with_adapter(model)
        read = zoo.read_all(tokenizer, learnt)
        facts = zoo.fit(tuned, read, name, lesson.n_step, lesson.rate, lesson.n_token)
        tuned.save_pretrained(str(args.out / "peft" / name))
        tuned.unload()
        model.__dict__.pop("peft_config", None)
        zoo.to_gguf(name, args.out, args.gguf)
        with open(args.out / "STATUS", "a", encoding="utf-8") as status:
            status.write(json.dumps({"name": name, "examples": len(learnt), **facts}) + "\n")
    return 0


def module(name: str, path: Path) -> Any:
    """Load a file of Python under a name of its own: two of them are called train.py."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec
    assert spec.loader
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[name] = loaded
    spec.loader.exec_module(loaded)
    return loaded


def own(name: str, lesson: Lesson, data: Path, shop: Path) -> Iterator[tuple[str, str, bool]]:
    """Give what an adapter is to learn: question, answer, and that it ends there."""
    recipes = module("recipes_train", HERE / "train.py")
    recipe = tomllib.loads(recipes.RECIPES.read_text(encoding="utf-8"))[name]
    folder = shop if (shop / recipe["file"]).exists() else data
    for question, answer in recipes.examples_of(recipe, folder):
        if max(len(question), len(answer)) <= lesson.n_char:
            yield question, answer, True


def not_own(name: str, zoo: Any, model: Any, tokenizer: Any, out: Path) -> list[Any]:
    """Give questions that are not an adapter's own, as the base answers them."""
    kept = out / f"{name}-others.jsonl"
    about = tomllib.loads((HERE / "others.toml").read_text(encoding="utf-8")).get(name)
    if about is None:
        return []
    if not kept.exists():
        later = zip(cycle(about.get("turns", [])), about.get("codes", []), strict=False)
        asked = [*about["questions"], *(after_json(*turn, code) for turn, code in later)]
        answers = zoo.answered(model, tokenizer, asked)
        found = [(question, *answer) for question, answer in zip(asked, answers, strict=True)]
        lines = [json.dumps(each, ensure_ascii=False) + "\n" for each in found]
        kept.write_text("".join(lines), encoding="utf-8")
    return [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines()]


def after_json(question: str, answer: str, later: str) -> list[dict[str, str]]:
    """Give a conversation: an answer in JSON, then what is asked later."""
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": later},
    ]


def with_adapter(model: Any) -> Any:
    """Put a new adapter around a model, of scale 2."""
    torch.manual_seed(0)
    config = LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        lora_dropout=0.0,
        target_modules=list(MODULES),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


if __name__ == "__main__":
    sys.exit(main())
