"""Train the zoo's adapters one after another, in the background, minutes each.

    nice -n 19 python benchmarks/zoo/train.py --base BASE.gguf OUT [NAME ...]

OUT gets peft/NAME, adapters/NAME.gguf and a line of STATUS for each: its half, loss before and
after, and how many of ten questions in words that training did not see it answers rightly alone.
What is there is not trained again. Without names all recipes are trained in their order.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "models" / "recipes")]

import torch  # noqa: E402
import transformers  # noqa: E402
from data import (  # noqa: E402
    EVERYDAY,
    FORMED,
    KNOWING,
    SHOP,
    SUBJECTS,
    Recipe,
    asked_as,
    asked_of,
    examples,
    known,
    recipes,
    some,
)
from packed import Read, loss_of, pack, steps  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from score import score  # noqa: E402

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
N_TOKEN, N_WARM, N_CHAT_TOKEN, N_SCORED = 320, 6, 32, 10


@dataclass(frozen=True)
class Lesson:
    """Token ids of the head that all prompts share, and examples behind it."""

    head: list[int]
    read: list[Read]


def main() -> int:
    """Train what is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", required=True, help="GGUF, or folder of transformers")
    parser.add_argument(
        "--gguf", default="qwen2.5-coder-0.5b-instruct", help="for conversion (%(default)s)"
    )
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--chats", action="store_true", help="write chats.jsonl and known.jsonl")
    parser.add_argument(
        "--dtype",
        default="bfloat16",
        choices=("bfloat16", "float32"),
        help="float32 is thrice as fast on processors without AMX and AVX512-BF16 (%(default)s)",
    )
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
    model, tokenizer = load(args.base, getattr(torch, args.dtype))
    if args.chats:
        write_chats(model, tokenizer)
        return 0
    (args.out / "adapters").mkdir(parents=True, exist_ok=True)
    wanted = recipes()
    for name in args.names or wanted:
        if not (args.out / "adapters" / f"{name}.gguf").exists():
            train(model, tokenizer, wanted[name], args.out, args.gguf)
    return 0


def load(base: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """Model, and tokenizer."""
    transformers.utils.logging.disable_progress_bar()
    where = base
    more: dict[str, Any] = {}
    if base.endswith(".gguf"):
        where = str(Path(base).parent)
        more["gguf_file"] = Path(base).name
    tokenizer = transformers.AutoTokenizer.from_pretrained(where, **more)
    if more:
        more["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(where, dtype=dtype, **more)
    return model, tokenizer


def prompt_ids(tokenizer: Any, asked: str | list[dict[str, str]]) -> list[int]:
    """Token ids of a question, or of a conversation, in the base's chat form."""
    messages = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def common(first: Sequence[int], second: Sequence[int]) -> int:
    """Count the tokens with which both begin."""
    for i, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return i
    return min(len(first), len(second))


def read_all(tokenizer: Any, learnt: Sequence[tuple[Any, str, bool]]) -> Lesson:
    """Give the head that all prompts share, and examples behind it.

    learnt  question or conversation, answer, and whether it ends there
    """
    n_head = common(prompt_ids(tokenizer, "A?"), prompt_ids(tokenizer, "one"))
    head = prompt_ids(tokenizer, "A?")[:n_head]
    read = []
    for asked, answer, is_whole in learnt:
        prompt = prompt_ids(tokenizer, asked)
        assert prompt[:n_head] == head, asked
        target = list(tokenizer(answer, add_special_tokens=False).input_ids)
        read.append(Read(prompt[n_head:], [*target, *[tokenizer.eos_token_id] * is_whole]))
    return Lesson(head, read)


def train(model: Any, tokenizer: Any, recipe: Recipe, out: Path, gguf: str) -> None:
    """Train an adapter, score it, save it, convert it."""
    lesson = read_all(tokenizer, examples(recipe))
    tuned = with_adapter(model, recipe.rank)
    facts = fit(tuned, lesson, recipe.name, recipe.steps, recipe.lr)
    right, asked, said = own_score(tuned.eval(), tokenizer, recipe)
    tuned.save_pretrained(str(out / "peft" / recipe.name))
    tuned.unload()
    model.__dict__.pop("peft_config", None)
    to_gguf(recipe.name, out, gguf)
    about = {"name": recipe.name, "half": recipe.half, "kind": recipe.kind, "rank": recipe.rank}
    scored = {"own": f"{right} of {asked}", "said": said}
    with open(out / "STATUS", "a", encoding="utf-8") as status:
        status.write(json.dumps(about | facts | scored, ensure_ascii=False) + "\n")


def with_adapter(model: Any, rank: int) -> Any:
    """Put a new adapter around a model, of scale 2."""
    torch.manual_seed(0)
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        target_modules=list(MODULES),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def fit(
    tuned: Any, lesson: Lesson, name: str, n_step: int, rate: float, n_step_token: int = N_TOKEN
) -> dict[str, Any]:
    """Train the weights that have gradients; give steps, tokens, seconds and losses."""
    start_s = time.monotonic()
    busy_s = time.process_time()
    trained = [weight for weight in tuned.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    n_warm = min(N_WARM, n_step // 2)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, n_warm, n_step)
    losses: list[float] = []
    n_token = 0
    for chosen in steps(lesson.read, n_step, n_step_token, seed=0):
        packed = pack(lesson.head, chosen)
        loss = loss_of(tuned, packed)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        n_token += packed.ids.shape[1]
        if len(losses) in (1, 2, 4) or len(losses) % 10 == 0:
            now = time.strftime("%H:%M:%S")
            speed = n_token / (time.monotonic() - start_s)
            busy = n_token / (time.process_time() - busy_s)
            rates = f"{speed:.0f} tokens/s, {busy:.0f} a second of CPU"
            print(now, name, len(losses), f"{losses[-1]:.3f}, {rates}", flush=True)
    spent_s = time.monotonic() - start_s
    return {
        "steps": n_step,
        "tokens": n_token,
        "seconds": round(spent_s),
        "tokens_per_s": round(n_token / spent_s),
        "loss_first": round(losses[0], 3),
        "loss_last_5": round(sum(losses[-5:]) / len(losses[-5:]), 4),
    }


def own_questions(recipe: Recipe) -> list[dict[str, Any]]:
    """Questions of an adapter's own kind, in words that training did not see."""
    if recipe.kind in KNOWING:
        language = SUBJECTS[recipe.learns].get("language", "en")
        return some(list(asked_of(recipe, language)), "own", N_SCORED)
    if recipe.kind in FORMED:
        return list(asked_as(known()[1], recipe.learns))[:N_SCORED]
    return []


def own_score(model: Any, tokenizer: Any, recipe: Recipe) -> tuple[int, int, str]:
    """Count right answers; give the first answer too."""
    items = own_questions(recipe)
    questions = [item["question"] for item in items] or [examples(recipe)[0][0]]
    answers = [text for text, _ in answered(model, tokenizer, questions)]
    n_right = sum(
        score(text, item)["score"] == 1.0 for text, item in zip(answers, items, strict=False)
    )
    return n_right, len(items), answers[0]


def answered(model: Any, tokenizer: Any, questions: Sequence[Any]) -> list[tuple[str, bool]]:
    """Greedy answers of at most N_CHAT_TOKEN tokens, and whether each ended by itself."""
    prompts = [prompt_ids(tokenizer, question) for question in questions]
    longest = max(map(len, prompts))
    end = tokenizer.eos_token_id
    ids = torch.tensor([[end] * (longest - len(prompt)) + prompt for prompt in prompts])
    sees = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    is_half = model.dtype == torch.bfloat16
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=is_half):
        rows = model.generate(
            input_ids=ids,
            attention_mask=sees,
            max_new_tokens=N_CHAT_TOKEN,
            do_sample=False,
            repetition_penalty=1.0,
            pad_token_id=end,
            eos_token_id=end,
        )[:, longest:].tolist()
    texts = [tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows]
    return [(text, end in row) for text, row in zip(texts, rows, strict=True)]


def write_chats(model: Any, tokenizer: Any) -> None:
    """Write what the base itself answers to everyday prompts and the shop's known questions."""
    mixed = EVERYDAY["mixed"]
    shop_known = tomllib.loads(SHOP.read_text(encoding="utf-8"))["known"]
    questions = random.Random(0).sample([*shop_known], len(shop_known))
    answers = answered(model, tokenizer, [*mixed, *questions])
    chats = [
        {"question": question, "answer": text, "is_whole": is_whole}
        for question, (text, is_whole) in zip(mixed, answers, strict=False)
    ]
    sentences = []
    for question, (text, _) in zip(questions, answers[len(mixed) :], strict=True):
        value = str(shop_known[question])
        sentence = text.partition("\n")[0].partition(". ")[0].rstrip(".") + "."
        is_right = value.casefold() in sentence.casefold()
        sentences.append(
            {
                "question": question,
                "answer": value,
                "sentence": sentence if is_right else f"It is {value}.",
            }
        )
    for name, lines in (("chats", chats), ("known", sentences)):
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (HERE / f"{name}.jsonl").write_text(text, encoding="utf-8")


def to_gguf(name: str, out: Path, gguf: str) -> None:
    """Convert a trained adapter."""
    target = out / "adapters" / f"{name}.gguf"
    part = out / "adapters" / f"{name}.part"
    program = Path(sys.executable).with_name("qaflora")
    asked = [program, "convert", out / "peft" / name, "--base", gguf, "-o", part, "--force"]
    subprocess.run([*asked, "--outtype", "q8_0"], check=True)
    part.rename(target)


if __name__ == "__main__":
    sys.exit(main())
