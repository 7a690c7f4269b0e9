"""How much faster guessed tokens make answers, and how many guesses are right.

    python benchmarks/guesses.py models/demo [--callers 2] [--repeat 5] [--max-tokens 64]

Prompts of several kinds, each round another one, are answered with guesses and without. Prints
medians of tokens a second, of that without guesses, and the share of guesses that were right.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

from qaflora_edge import Engine
from qaflora_edge.bench import Run, compared, take_turns

PROMPTS: dict[str, list[str]] = json.loads(Path(__file__).with_suffix(".json").read_text("utf-8"))
Engines = dict[str, Engine]


def answer(engine: Engine, kind: str, n: int, max_tokens: int, turn: int) -> Run:
    """Answer n prompts of a kind together; another turn takes others."""
    texts = PROMPTS[kind]
    chats = []
    for number in range(n * turn, n * turn + n):
        message = {"role": "user", "content": texts[number % len(texts)]}
        chats.append(engine.chat_tokens([message]))
    answers = engine.generate_many(chats, max_tokens=max_tokens)
    timings = [generation.timings for _, generation in answers]
    start_s = max(times.token_s[0] for times in timings)  # all have begun
    later = [at for times in timings for at in times.token_s if at > start_s]
    n_guessed = sum(times.guessed_n for times in timings)
    n_right = sum(times.guessed_n_right for times in timings)
    return {
        "tokens_per_second": len(later) / (max(later) - start_s),
        "accepted": n_right / max(1, n_guessed),
    }


def measure(engines: Engines, n_caller: int, repeat: int, max_tokens: int) -> list[dict[str, Any]]:
    """Give a row for each kind of prompt, and one of prose for several callers."""
    kinds = dict.fromkeys([*((kind, 1) for kind in PROMPTS), ("prose", n_caller)])
    contestants = {}
    for kind, n in kinds:
        for way, engine in engines.items():
            contestants[kind, n, way] = partial(answer, engine, kind, n, max_tokens)
    runs = take_turns(contestants, repeat, lambda done, total: None)
    rows = []
    for kind, n in kinds:
        guessed = runs[kind, n, "draft"]
        row = {"name": f"{kind}, {n} callers" if n > 1 else kind, "runs": guessed}
        row |= compared("tokens_per_second", guessed, of_plain=runs[kind, n, "plain"])
        row |= compared("accepted", guessed)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("bundle")
    parser.add_argument("--strategy")
    parser.add_argument("--guesses", default="auto", help="guesses at most; auto: as many as pay")
    parser.add_argument("--callers", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--max-tokens", type=int, default=64)
    args = parser.parse_args()
    n_guess = args.guesses if args.guesses == "auto" else int(args.guesses)
    options = {"strategy": args.strategy, "n_parallel": args.callers}
    with (
        Engine(args.bundle, guesses=n_guess, **options) as draft,
        Engine(args.bundle, guesses=0, **options) as plain,
    ):
        engines = {"draft": draft, "plain": plain}
        for row in measure(engines, args.callers, args.repeat, args.max_tokens):
            print(json.dumps(row))


if __name__ == "__main__":
    main()
