"""Train one LoRA adapter by a recipe of recipes.toml, and say whether it helps in its own subject.

    pip install torch transformers peft accelerate datasets
    python models/recipes/train.py math --base BASE.gguf --data DATA -o math-adapter --minutes 60

The base is a GGUF that transformers can dequantise, or a folder or name as it takes them. One
example in 20 is held out: their loss is measured before and after, and an adapter that does not
lower it is no adapter (exit code 1). A training that was ended goes on from its last checkpoint
when it is started again. What comes out is a PEFT adapter for `qaflora bundle create --adapter`.

On Linux torch asks the system for its memory again and again; let it keep what it has, in large
pages: a step of 0.5B took .7 of the time (the first 13 of two runs, two cores with AVX-512):

    export GLIBC_TUNABLES=glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=100000000000
    GLIBC_TUNABLES=$GLIBC_TUNABLES:glibc.malloc.hugetlb=1 python models/recipes/train.py ...
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import string
import sys
import time
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    GgufConfig,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

RECIPES = Path(__file__).with_name("recipes.toml")
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
HELD_OUT = 20  # one example in so many
MAX_HELD_OUT = 100
BEGUN = "begun.json"
FREE = ("out", "data", "minutes")  # may differ when a training is gone on with


def main(words: Sequence[str] | None = None) -> int:
    """Train, measure, save."""
    args = arguments(words)
    recipe = tomllib.loads(RECIPES.read_text(encoding="utf-8"))[args.recipe]
    examples = list(itertools.islice(examples_of(recipe, args.data), args.examples))
    if len(examples) < HELD_OUT:
        sys.exit(f"Recipe {args.recipe} gives {len(examples)} examples, expected {HELD_OUT}.")
    begun = begun_with(args)
    set_seed(args.seed)
    model, tokenizer = load(args.base)
    read = [tokens_of(tokenizer, *example, args.max_tokens) for example in examples]
    read = [example for example in read if any(label >= 0 for label in example["labels"])]
    trainer = Trainer(
        get_peft_model(
            model,
            LoraConfig(
                r=args.rank,
                lora_alpha=2 * args.rank if args.rank <= 16 else 8,  # scale 2; 8 / sqrt(rank)
                lora_dropout=0.0,
                target_modules=list(MODULES),
                use_rslora=args.rank > 16,
                task_type="CAUSAL_LM",
            ),
        ),
        args=config(args),
        train_dataset=[example for i, example in enumerate(read) if i % HELD_OUT],
        eval_dataset=read[::HELD_OUT][:MAX_HELD_OUT],
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
    )
    before = begun.get("loss")
    if before is None:
        before = trainer.evaluate()["eval_loss"]
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / BEGUN).write_text(json.dumps({**begun, "loss": before}))
    trainer.add_callback(Clock(args.minutes))
    trainer.train(resume_from_checkpoint=last_checkpoint(args.out))
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model(str(args.out))
    facts = {
        "recipe": args.recipe,
        "data": recipe.get("file") or recipe["hub"]["path"],
        "licence": recipe["licence"],
        "examples": len(examples),
        "steps": trainer.state.global_step,
        "tokens": trainer.state.num_input_tokens_seen,
        "held_out_loss": {"base": round(before, 4), "adapter": round(after, 4)},
    }
    (args.out / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts, indent=2))
    return 0 if after < before else 1


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line, or words in its place."""
    summary, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = tomllib.loads(RECIPES.read_text(encoding="utf-8"))
    parser.add_argument("recipe", choices=names)
    parser.add_argument("--base", required=True, help="GGUF, folder, or name on the Hub")
    parser.add_argument("--data", type=Path, help="folder with the recipe's file; else the Hub")
    parser.add_argument("-o", dest="out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60, help="of training (%(default)s)")
    parser.add_argument("--rank", type=int, default=16, help="(%(default)s)")
    parser.add_argument("--lr", type=float, default=2e-4, help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=400, help="at most (%(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="examples a step (%(default)s)")
    parser.add_argument("--max-tokens", type=int, default=320, help="of one (%(default)s)")
    parser.add_argument("--examples", type=int, default=20_000, help="at most (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(words)


def begun_with(args: argparse.Namespace) -> dict[str, Any]:
    """What a training was begun with, and the loss before it where one was; no other goes on."""
    ours = {key: value for key, value in vars(args).items() if key not in FREE}
    try:
        theirs: dict[str, Any] = json.loads((args.out / BEGUN).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return ours
    for key, value in ours.items():
        if theirs.get(key) != value:
            found = f"was begun with {key} {theirs.get(key)}, expected {value}"
            sys.exit(f"The training in {args.out} {found}. Choose another -o.")
    return theirs


def last_checkpoint(out: Path) -> str | None:
    """The folder of the newest checkpoint that is whole: its state is written last."""
    whole = (path.parent for path in out.glob("checkpoints/checkpoint-*/trainer_state.json"))
    last = max(whole, key=lambda folder: int(folder.name.split("-")[1]), default=None)
    return None if last is None else str(last)


def config(args: argparse.Namespace) -> TrainingArguments:
    """Cosine decay after ten steps, or a quarter of fewer than forty."""
    return TrainingArguments(
        output_dir=str(args.out / "checkpoints"),
        per_device_train_batch_size=args.batch,
        per_device_eval_batch_size=args.batch,
        train_sampling_strategy="group_by_length",
        learning_rate=args.lr,
        lr_scheduler_type="cosine",
        warmup_steps=min(10, args.steps // 4),
        max_steps=args.steps,
        max_grad_norm=1.0,
        bf16=quickest() is torch.bfloat16,
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=torch.cuda.is_available(),
        include_num_input_tokens_seen=True,
        save_steps=10,
        save_total_limit=1,
        logging_steps=10,
        report_to="none",
        seed=args.seed,
    )


class Clock(TrainerCallback):  # type: ignore[misc]
    """Ends a training in time, and saves it; what ran before an interruption does not count."""

    def __init__(self, minutes: float) -> None:
        self.end_s = time.monotonic() + 60 * minutes

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        if time.monotonic() > self.end_s:
            control.should_training_stop = control.should_save = True
        return control


@cache
def quickest() -> torch.dtype:
    """What this machine multiplies soonest: bfloat16 takes a CPU without AMX 1.6 times as long."""

    def seconds(dtype: torch.dtype) -> float:
        rows, matrix = (torch.ones(n, 1024, dtype=dtype) for n in (256, 4096))
        rows @ matrix.T  # what is prepared once
        start = time.perf_counter()
        for _ in range(3):
            rows @ matrix.T
        return time.perf_counter() - start

    is_float32 = not torch.cuda.is_available() and seconds(torch.float32) < seconds(torch.bfloat16)
    return torch.float32 if is_float32 else torch.bfloat16


def load(base: str) -> tuple[Any, Any]:
    """Model and tokenizer."""
    where, more = base, {}
    if base.endswith(".gguf"):
        where, more = str(Path(base).parent), {"gguf_file": Path(base).name}
    tokenizer = AutoTokenizer.from_pretrained(where, **more)
    if more:
        more["quantization_config"] = GgufConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(where, dtype=quickest(), **more), tokenizer


# examples


def tokens_of(tokenizer: Any, question: str, answer: str, n_most: int) -> dict[str, list[int]]:
    """Token ids in chat form; the labels are those of the answer, all else is -100."""
    message = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(text, add_special_tokens=False).input_ids
    target = [*tokenizer(answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    ids = [*prompt, *target][:n_most]
    return {"input_ids": ids, "labels": [*[-100] * len(prompt), *target][:n_most]}


def examples_of(recipe: Mapping[str, Any], data: Path | None) -> Iterator[tuple[str, str]]:
    """Questions and answers."""
    drop, forms = re.compile(recipe.get("drop", r"(?!)")), itertools.cycle(recipe["forms"])
    for row in rows_of(recipe, data):
        if all(row.get(key) == value for key, value in recipe.get("where", {}).items()):
            question, answer = (Fields().vformat(form, (), row) for form in next(forms))
            yield question, drop.sub("", answer)


def rows_of(recipe: Mapping[str, Any], data: Path | None) -> Iterable[Mapping[str, Any]]:
    """Rows of the recipe's file, or of the Hub."""
    file = recipe.get("file")
    if file == "diseases":
        n_form = len(recipe["forms"])
        return [row for i in range(3 * n_form) for row in diseases(i // n_form)]
    if file and data:
        if not (data / file).exists():
            sys.exit(f"There is no {file} in {data}; models/README.md says what it is.")
        with open(data / file, encoding="utf-8") as lines:
            return [with_choices(json.loads(line)) for line in lines]
    if "hub" in recipe:
        from datasets import load_dataset

        rows: Iterable[Mapping[str, Any]] = load_dataset(**recipe["hub"])
        return rows
    sys.exit(f"The recipe's data is the file {file}: give its folder with --data.")


def with_choices(row: dict[str, Any]) -> dict[str, Any]:
    """A row with its choices as lines."""
    if "choices" in row:
        lines = [
            f"{letter}. {choice}"
            for letter, choice in zip(string.ascii_uppercase, row["choices"], strict=False)
        ]
        row |= {"right": lines[row["answer"]], "choices": "\n".join(lines)}
    return row


class Fields(string.Formatter):
    """Fields of a row; {field:head} is the first sixth of one."""

    def format_field(self, value: Any, spec: str) -> str:
        return str(value)[: max(10, len(value) // 6)] if spec == "head" else str(value)


def diseases(turn: int) -> Iterator[dict[str, str]]:
    """Diseases with their symptoms and drugs, of the package faker-healthcare-provider.

    turn  lists begin so many places later
    """
    from faker_healthcare.disease_correlations import DISEASE_CORRELATIONS

    for name, facts in DISEASE_CORRELATIONS.items():
        lists = {key: in_words(facts[key], turn) for key in ("symptoms", "medications")}
        yield {**facts, **lists, "name": name}


def in_words(names: Sequence[str], turn: int) -> str:
    """Names as a sentence lists them, beginning so many places later."""
    at = turn % len(names)
    *most, last = [*names[at:], *names[:at]]
    return f"{', '.join(most)} and {last}" if most else last


if __name__ == "__main__":
    sys.exit(main())
