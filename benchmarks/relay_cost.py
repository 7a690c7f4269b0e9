"""Time whole answers under `relay`, as multiples of `two-place`.

    python benchmarks/relay_cost.py demo TASK... [--tokens 100,300] [--limit 5] [--repeat 5]

TASK is a file as `qaflora eval` takes it; models/recipes/shop.py writes some. Each question is
asked behind a system prompt that makes it so many tokens long. Other chats come between the runs,
so no KV state of one serves the next. Both strategies take turns, the first round is thrown away,
and ratios are taken within a round. `seen` is the first piece of text that a user sees, drafts
included.
"""

import argparse
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from qaflora_edge import Engine
from qaflora_edge.evaluation.tasks import Task, read_task
from qaflora_edge.prompt.neutral import neutral

STRATEGIES = ("two-place", "relay")


@dataclass(frozen=True)
class Timed:
    """Seconds of one answer, and to the first text that is seen."""

    whole: float
    seen: float
    is_relayed: bool
    n_token: int


def main() -> None:
    """Print the medians for each task and length."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument("tasks", type=Path, nargs="+", metavar="TASK")
    parser.add_argument("--tokens", default="100,300", metavar="A,B,...")
    parser.add_argument("--limit", type=int, default=5, metavar="N", help="questions of each task")
    parser.add_argument("--repeat", type=int, default=5, metavar="N")
    args = parser.parse_args()
    lengths = [int(length) for length in args.tokens.split(",")]
    print("task, tokens, kind: whole, seen (times two-place); answers; tokens of an answer")
    with Engine(args.bundle, n_ctx=2048) as engine:
        for path in args.tasks:
            task = read_task(path)
            for length in lengths:
                _print_task(engine, task, length, args.limit, args.repeat)


def _print_task(engine: Engine, task: Task, length: int, limit: int, repeat: int) -> None:
    whole: dict[bool, list[float]] = defaultdict(list)
    seen: dict[bool, list[float]] = defaultdict(list)
    n_token: dict[bool, list[int]] = defaultdict(list)
    for item in task.items[:limit]:
        tokens = _prompt(engine, task.question(item), length)
        for turn in range(1 + repeat):
            runs: dict[str, Timed] = {}
            for name in STRATEGIES if turn % 2 else STRATEGIES[::-1]:
                _forget(engine)
                runs[name] = _answer(engine, tokens, name)
            plain, relay = (runs[name] for name in STRATEGIES)
            if turn > 0:
                whole[relay.is_relayed].append(relay.whole / plain.whole)
                seen[relay.is_relayed].append(relay.seen / plain.seen)
                n_token[relay.is_relayed].append(plain.n_token)
    for is_relayed, ratios in sorted(whole.items()):
        kind = "relayed" if is_relayed else "alone"
        print(
            f"{task.name}, {length}, {kind}: {median(ratios):.2f}, {median(seen[is_relayed]):.2f}; "
            f"{len(ratios)}; {median(n_token[is_relayed]):.0f}",
            flush=True,
        )


def _forget(engine: Engine) -> None:
    """Ask something else in both slots, of the answer and of the base's prefill."""
    for other in neutral("turns")[:4]:
        engine.generate(other, strategy="base", max_tokens=1).text()


def _prompt(engine: Engine, question: str, length: int) -> list[int]:
    """Give a chat of about so many tokens that ends with the question."""
    texts = neutral("prompts")
    about = "People have asked you these questions before, and you have answered them all. "
    system = f"You are a helpful assistant. {about}"
    for text in texts:
        messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
        tokens = engine.chat_tokens(messages)
        if len(tokens) >= length:
            break
        system += f"{text} "
    return tokens


def _answer(engine: Engine, tokens: list[int], strategy: str) -> Timed:
    drafted: list[float] = []

    def on_draft(text: str) -> None:
        if text:
            drafted.append(time.perf_counter())

    start = time.perf_counter()
    answer = engine.generate(tokens, strategy=strategy, max_tokens=64, on_draft=on_draft)
    first = next(answer.drafting(), None) or next(answer, None)
    assert first is not None
    drafted.append(time.perf_counter())
    seen = drafted[0] - start
    answer.text()
    whole = time.perf_counter() - start
    return Timed(whole, seen, answer.draft is not None, answer.n_completion)


if __name__ == "__main__":
    main()
