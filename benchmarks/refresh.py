"""Weigh the adapters again every so many tokens of an answer, and score what comes of it.

    python benchmarks/refresh.py BUNDLE TASK.jsonl --every 64 --strategy qa-flora -o RESULTS.jsonl

The prompt with the answer so far is weighed as a prompt is, and all of it is read again under the
new weights. RESULTS is a file as `qaflora eval` writes it, with the strategy `qa-flora, each 64`.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qaflora_edge import Engine, FusionWeights, Plan
from qaflora_edge.answering.generation import Generation
from qaflora_edge.evaluation.run import asked_fields, header, score_fields, task_prompt
from qaflora_edge.evaluation.tasks import kept_results, read_task


class Answer:
    """What there is of an item's answer."""

    def __init__(self, prompt: Sequence[int]) -> None:
        self.prompt, self.tokens = list(prompt), [*prompt]
        self.probe_ms, self.reason = 0.0, "length"
        self.fusions: list[Any] = []

    def take(self, piece: Generation) -> None:
        """Go on with a piece."""
        self.tokens += piece._sequence.answer
        self.fusions.append(piece.fusion)
        self.probe_ms += piece.timings.probe_ms
        piece.text()  # finish_reason is that of what was taken
        self.reason = piece.finish_reason or "error"


def answers_of(
    engine: Engine, prompts: Sequence[Sequence[int]], *, every: int, n_most: int
) -> list[Answer]:
    """All answers, by turns of `every` tokens."""
    answers = [Answer(prompt) for prompt in prompts]
    for start in range(0, n_most, every):
        going = [answer for answer in answers if answer.reason == "length"]
        n_token = min(every, n_most - start)
        asked = [{"prompt": answer.tokens, "max_tokens": n_token} for answer in going]
        for index, piece in engine.generate_many(asked):
            if piece.error is not None:
                raise piece.error
            going[index].take(piece)
    return answers


def main() -> None:
    """Answer the items and write their results."""
    summary, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("task", type=Path)
    parser.add_argument("-o", dest="out", type=Path, required=True)
    parser.add_argument("--every", type=int, default=64, help="tokens (default: %(default)s)")
    parser.add_argument("--strategy", default="qa-flora")
    parser.add_argument("--adapters", help="names, with commas; all by default")
    parser.add_argument("--half", choices=("dev", "test"), default="test")
    parser.add_argument("--limit", type=int)
    args = parser.parse_args()
    task = read_task(args.task)
    if task.metric not in ("number", "exact", "contains"):
        raise SystemExit(f"{args.task} has the metric {task.metric}, expected one of answers.")
    if task.stop:
        raise SystemExit(f"{args.task} has texts to stop at, which are not looked for here.")
    strategy = f"{args.strategy}, each {args.every}"
    items = range(args.half == "test", len(task.items), 2)[: args.limit]
    with Engine(args.bundle, strategy=args.strategy, n_ctx=2048, n_parallel=16) as engine:
        if args.adapters:
            engine.use_adapters(args.adapters.split(","))
        told = {"every": args.every, "n_ctx": 2048}
        head = header(args.bundle, engine, [task], [strategy], told)
        with kept_results(args.out, head) as file:
            left = [item for item in items if (task.name, item, strategy) not in file.records]
            prompts = [task_prompt(engine, task, task.items[item]) for item in left]
            answers = answers_of(engine, prompts, every=args.every, n_most=task.max_tokens or 256)
            for item, answer in zip(left, answers, strict=True):
                means = np.mean([fusion.weights for fusion in answer.fusions], axis=0)
                fusion = FusionWeights(engine.adapters, Plan.mix(means), strategy)
                pieces = map(engine._model.piece, answer.tokens[len(answer.prompt) :])
                text = b"".join(pieces).decode("utf-8", "replace")
                found = score_fields(task, task.items[item], text)
                file.add(
                    {
                        **asked_fields(task, item, strategy),
                        "weights": fusion.means,
                        **found,
                        "probe_ms": round(answer.probe_ms, 3),
                        "probe_before_ms": 0.0,
                        "prefill_ms": 0.0,
                        "decode_ms": 0.0,
                        "n_prompt": len(answer.prompt),
                        "n_token": len(answer.tokens) - len(answer.prompt),
                        "finish_reason": answer.reason,
                    }
                )
                print(f"{task.name} {item}: {found['score']:.4g}", flush=True)


if __name__ == "__main__":
    main()
