"""Ask maths in other languages with the language's adapter outside and the subject's inside.

    python benchmarks/depth.py BUNDLE TASK ... -o RESULTS.jsonl [--limit N]

BUNDLE names an adapter `math` and one like each TASK's language. The base prefills every prompt.
Results are added to RESULTS.jsonl, what it has is not asked again, and totals are printed.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from qaflora_edge import Engine
from qaflora_edge.evaluation.tasks import read_task

SUBJECT = "math"


def _outer(n_layer: int, share: float) -> Any:
    """Tell which layers are in the first or last `share` of all: bool [n_layer]."""
    at = np.arange(n_layer)
    return np.minimum(at, n_layer - 1 - at) < round(share * n_layer)


# The language's and the subject's weights in each layer, of the number of layers.
Profile = Callable[[int], tuple[Any, Any]]
PROFILES: dict[str, Profile] = {
    "half of both": lambda n: (np.full(n, 0.5), np.full(n, 0.5)),
    "math 1, language 0.5": lambda n: (np.full(n, 0.5), np.ones(n)),
    "math alone": lambda n: (np.zeros(n), np.ones(n)),
    "language outside, math inside": lambda n: (_outer(n, 0.25), ~_outer(n, 0.25)),
    "math 1, language 0.5 outside": lambda n: (0.5 * _outer(n, 0.25), np.ones(n)),
}


def main() -> None:
    """Ask each question under each profile, and print how many are right."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument("tasks", type=Path, nargs="+", metavar="TASK")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="RESULTS.jsonl")
    parser.add_argument("--limit", type=int, metavar="N", help="ask N items of each task")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    args.output.touch()
    lines = [json.loads(line) for line in args.output.read_text(encoding="utf-8").splitlines()]
    known = {(line["language"], line["item"], line["profile"]) for line in lines}
    with Engine(args.bundle, n_parallel=16, n_ctx=1024, threads=args.threads) as engine:
        asked, requests = [], []
        for task in map(read_task, args.tasks):
            for index, item in enumerate(task.items[: args.limit]):
                for name, profile in PROFILES.items():
                    if (task.language, index, name) in known:
                        continue
                    weights = np.zeros((len(engine.adapters), engine.n_layer), np.float32)
                    language, subject = profile(engine.n_layer)
                    weights[engine.adapters.index(str(task.language))] = language
                    weights[engine.adapters.index(SUBJECT)] = subject
                    asked.append((task, index, name))
                    question = {"prompt": task.asked(item), "weights": weights, "prefill": "base"}
                    requests.append(question | {"max_tokens": task.max_tokens or 256})
        with args.output.open("a", encoding="utf-8") as file:
            for at, answer in engine.generate_many(requests):
                task, index, name = asked[at]
                line = {"language": task.language, "item": index, "profile": name}
                text = answer.text()
                line |= {"answer": text, "n_token": answer.n_completion}
                line["score"] = task.by.score(text, task.items[index])
                lines.append(line)
                print(json.dumps(line, ensure_ascii=False), file=file, flush=True)
    scores: dict[str, list[float]] = defaultdict(list)
    for line in lines:
        scores[line["profile"]].append(line["score"])
    for name, each in scores.items():
        print(f"{name}: {sum(each):g} of {len(each)} right")


if __name__ == "__main__":
    main()
