"""LoRAHub (arXiv 2307.13269) as a baseline: one weight per adapter, searched on a few examples.

    pip install cma
    python benchmarks/lorahub.py BUNDLE TASK.jsonl --half dev --examples 6 --budget 30

Prints the best mix as a strategy, `manual:math=0.41,es=-0.2`, for `qaflora eval --strategies`. An
example's right answer is its `continuation`, else its `answer`.

As published: weights from -1.5 to 1.5, starting at 0; the objective is the mean loss of the
examples plus 0.05 times the mean of |w|. Not as published: adapters are added as w scale B A each.
LoRAHub adds up A and B apart, which mixes one adapter's A with another's B. The search is CMA-ES by
the package cma; LoRAHub's own is nevergrad, which mostly runs CMA-ES here.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qaflora_edge import Engine
from qaflora_edge.evaluation.run import task_prompt
from qaflora_edge.evaluation.tasks import Task, read_task

BOUND, L1 = 1.5, 0.05
STEP = 0.5  # of the first steps: a sixth of the range, nevergrad's default
HALVES = {"all": slice(None), "dev": slice(0, None, 2), "test": slice(1, None, 2)}


@dataclass(frozen=True)
class Examples:
    """Token ids of each prompt, and the text that should follow it."""

    prompts: tuple[tuple[int, ...], ...]
    answers: tuple[str, ...]

    def loss(self, engine: Engine, weights: Sequence[float]) -> float:
        """Nats a token of the right answers: the mean over examples of each one's mean.

        weights  of the adapters in use
        """
        of_adapter = dict(zip(engine.adapters, weights, strict=True))
        scores = engine.score(list(self.prompts), list(self.answers), weights=of_adapter)
        return float(np.mean([-score.astype(np.float64).mean() for score in scores]))


def choose(items: Sequence[int], n: int, seed: int) -> list[int]:
    """Draw n of some indexes; keep their order."""
    chosen = np.random.default_rng(seed).permutation(len(items))[:n]
    return sorted(items[int(at)] for at in chosen)


def read_examples(engine: Engine, task: Task, items: Sequence[int]) -> Examples:
    """Read items of a task as an evaluation asks them."""
    chosen = [task.items[index] for index in items]
    prompts = tuple(tuple(task_prompt(engine, task, item)) for item in chosen)
    return Examples(prompts, tuple(right_answer(task, index) for index in items))


def right_answer(task: Task, index: int) -> str:
    """Give the text that should answer an item: `continuation`, else its first answer."""
    item = task.items[index]
    found = item.get("continuation", task.expected(item))
    text = found[0] if isinstance(found, list) else found
    if text in (None, ""):
        raise SystemExit(f"Item {index} has no right answer. Add the field continuation.")
    return str(text)


def objective(weights: Sequence[float], loss: float) -> float:
    """Add LoRAHub's penalty to a loss: the mean of |w|, as in its code, not the sum."""
    return loss + L1 * float(np.abs(weights).mean())


def search(
    loss: Callable[[Sequence[float]], float], n_adapter: int, *, budget: int, seed: int
) -> tuple[float, ...]:
    """Find the weights [n_adapter] with the smallest objective in `budget` tries.

    loss  weights -> mean loss of the examples under them
    """
    tried: list[tuple[float, tuple[float, ...]]] = []

    def attempt(weights: Sequence[float]) -> float:
        at = tuple(map(float, weights))
        found = objective(at, loss(at))
        tried.append((found, at))
        print(f"{len(tried)}: {found:.4f} at {', '.join(f'{w:.3f}' for w in at)}", flush=True)
        return found

    attempt([0.0] * n_adapter)
    if n_adapter == 1:
        for weight in np.linspace(-BOUND, BOUND, budget - 1):
            attempt([weight])
    else:
        by_cma(attempt, n_adapter, budget - 1, seed)
    return min(tried)[1]


def by_cma(
    attempt: Callable[[Sequence[float]], float], n_adapter: int, budget: int, seed: int
) -> None:
    """Try `budget` weights that CMA-ES asks for."""
    import cma

    options: dict[str, Any] = {"bounds": [-BOUND, BOUND], "seed": seed + 1, "verbose": -9}
    strategy = cma.CMAEvolutionStrategy(np.zeros(n_adapter), STEP, options)
    while budget > 0:
        points = strategy.ask()
        if len(points) > budget:
            for point in points[:budget]:
                attempt(point)
            return
        strategy.tell(points, [attempt(point) for point in points])
        budget -= len(points)


def main(words: Sequence[str] | None = None) -> None:
    """Search the weights and print them as a strategy."""
    summary, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("task", type=Path)
    parser.add_argument("--adapters", help="names, with commas; all by default")
    parser.add_argument("--half", choices=HALVES, default="all")
    parser.add_argument("--examples", type=int, default=20)
    parser.add_argument("--budget", type=int, default=40, help="weights that are tried")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(words)
    task = read_task(args.task)
    items = choose(range(len(task.items))[HALVES[args.half]], args.examples, args.seed)
    with Engine(args.bundle, strategy="base") as engine:
        if args.adapters:
            engine.use_adapters(args.adapters.split(","))
        examples = read_examples(engine, task, items)
        best = search(
            lambda weights: examples.loss(engine, weights),
            len(engine.adapters),
            budget=args.budget,
            seed=args.seed,
        )
        pairs = zip(engine.adapters, best, strict=True)
        print(f"manual:{','.join(f'{name}={weight:.6g}' for name, weight in pairs)}")


if __name__ == "__main__":
    main()
