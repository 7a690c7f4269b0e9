"""Print which adapters everyday prompts get, as short_turns.json expects or not.

    python benchmarks/short_turns.py BUNDLE [--half dev|confirm] [--strategy STRATEGY]

BUNDLE names its adapters math, code or coder, and languages en, es, ru, zh, fr. The rule of
`two-place` was made on the half `dev`.
"""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

from qaflora_edge import Engine

SUBJECTS = {"sum": {"math"}, "code": {"code", "coder"}}
SEED = 29


def main() -> None:
    """Print a line for each prompt, and how many are right."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument("--half", choices=("dev", "confirm"), help="both by default")
    parser.add_argument("--strategy", default="two-place")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    right = []
    with Engine(args.bundle, strategy=args.strategy, threads=args.threads) as engine:
        for half, kind, language, prompt in prompts():
            if args.half in (None, half):
                tokens = engine.chat_tokens([{"role": "user", "content": prompt}])
                means = engine.weights(tokens).weights.mean(axis=1)
                shares = {n: float(w) for n, w in zip(engine.adapters, means, strict=True) if w > 0}
                right.append(is_right(kind, language, {*shares}, {*engine.adapters}))
                mix = " ".join(f"{name} {share:.2f}" for name, share in shares.items()) or "base"
                word = "right" if right[-1] else "WRONG"
                print(f"{word} | {half} | {kind} | {language} | {mix} | {prompt}")
    print(f"{sum(right)} of {len(right)} right")


def prompts() -> Iterator[tuple[str, str, str, str]]:
    """Give half, kind, language and prompt: of two alike one is in each half."""
    text = Path(__file__).with_name("short_turns.json").read_text(encoding="utf-8")
    draw = random.Random(SEED)
    for kind, languages in json.loads(text)["prompts"].items():
        for language, pair in languages.items():
            first = draw.randrange(2)
            yield "dev", kind, language, pair[first]
            yield "confirm", kind, language, pair[1 - first]


def is_right(kind: str, language: str, chosen: set[str], adapters: set[str]) -> bool:
    """Tell whether these are the subject's adapter, if any, with or without the language's."""
    return chosen - {language} == SUBJECTS.get(kind, set()) & adapters


if __name__ == "__main__":
    main()
