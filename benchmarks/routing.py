"""Print which adapters are chosen for prompts, and how many choices are right.

    python benchmarks/routing.py BUNDLE [TASK ...] [--half dev|confirm] [--limit N] [--later]

TASK is a file as `qaflora eval` takes it, whose name has the adapters that its questions need, and
perhaps their language, as company_json_es.jsonl. Without one the everyday prompts of routing.json
are asked; those of the half `dev` served to make the rule of `two-place`. With --later each prompt
is asked behind each exchange of routing.json, as a chat's second turn.
"""

import argparse
import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import NamedTuple

from qaflora_edge import Engine
from qaflora_edge.evaluation.tasks import read_task

DATA = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
NAMES = {"sum": ("math",), "code": ("code", "coder")}
SEED = 29


class Asked(NamedTuple):
    """A prompt, its kind and language, and the names of adapters that it needs."""

    kind: str
    language: str
    prompt: str
    needed: frozenset[str]


def main() -> None:
    """Print a line for each prompt, and how many of each kind are right."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument("tasks", type=Path, nargs="*", metavar="TASK")
    parser.add_argument("--half", choices=("dev", "confirm"), help="of the everyday prompts")
    parser.add_argument("--limit", type=int, metavar="N", help="ask N items of each task")
    parser.add_argument("--later", action="store_true", help="ask behind another exchange")
    parser.add_argument("--strategy", default="two-place")
    parser.add_argument("--threads", type=int)
    args = parser.parse_intermixed_args()
    asked = [each for path in args.tasks for each in _items(path, args.limit)]
    asked = asked or [*_everyday(args.half)]
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    with Engine(args.bundle, strategy=args.strategy, threads=args.threads) as engine:
        for said in DATA["exchanges"] if args.later else [()]:
            for kind, language, prompt, needed in asked:
                turns = zip(("user", "assistant", "user"), (*said, prompt)[-3:], strict=False)
                tokens = engine.chat_tokens([{"role": r, "content": c} for r, c in turns])
                means = engine.weights(tokens).weights.mean(axis=1)
                mix = {n: float(w) for n, w in zip(engine.adapters, means, strict=True) if w > 0}
                word = _judged(mix, language, needed & {*engine.adapters})
                counts[kind][word] += 1
                shown = " ".join(f"{name} {share:.2f}" for name, share in mix.items()) or "base"
                print(f"{word} | {kind} | {language} | {shown} | {prompt!r:.80}")
    counts["all"] = sum(counts.values(), Counter())
    for kind, each in counts.items():
        n_first = each["right"] + each["first"]
        print(f"{kind}: {each['right']} of {each.total()} right, {n_first} by the first adapter")


def _judged(mix: Mapping[str, float], language: str, needed: Set[str]) -> str:
    """Tell whether a mix is right, with or without the language's adapter, or just its first."""
    if mix.keys() - {language} == needed:
        return "right"
    return "first" if max(mix, key=lambda name: mix[name], default="") in needed else "WRONG"


def _items(path: Path, limit: int | None) -> Iterator[Asked]:
    task = read_task(path)
    needed = frozenset(task.name.split("_")) - {task.language}
    for item in task.items[:limit]:
        yield Asked("_".join(sorted(needed)), task.language or "", task.question(item), needed)


def _everyday(half: str | None) -> Iterator[Asked]:
    """Give the prompts of routing.json: of two alike one is in each half."""
    draw = random.Random(SEED)
    for kind, languages in DATA["prompts"].items():
        for language, prompts in languages.items():
            for pair in zip(prompts[::2], prompts[1::2], strict=True):
                first = draw.randrange(2)
                halves = {"dev": pair[first], "confirm": pair[1 - first]}
                for prompt in halves.values() if half is None else [halves[half]]:
                    yield Asked(kind, language, prompt, frozenset(NAMES.get(kind, ())))


if __name__ == "__main__":
    main()
