"""Check a bundle: does each adapter act, and are questions with known answers answered right?"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qaflora_edge.arrays import F32
from qaflora_edge.bundles.taught import read_lines, read_path
from qaflora_edge.engine import Engine
from qaflora_edge.evaluation.metrics import BUILT_IN
from qaflora_edge.prompt.messages import as_turn
from qaflora_edge.prompt.neutral import few
from qaflora_edge.weighing.plan import BASE

MAX_TOKENS = 200  # of an answer
# Nats of a token of everyday text. Six trained adapters change one by 0.5 to 2.6 at most, and the
# mean by 0.3; at twelve times their scale they add 2 to 19 to the mean.
STILL_NATS = 1e-3
NOISE_NATS = 3.0

Tested = tuple[Any, str]  # a question, as a text or messages, and what a right answer has


@dataclass
class AdapterCheck:
    """What was found of one adapter.

    change_nats  the most that it changes the log-probability of a token of everyday text
    loss_nats    how much less probable it makes such a token, in the mean
    n_alone, n_mixed, n_base  right answers of n_tested: alone, in the bundle, by the base
    others       who was taken in its place -> how often
    """

    name: str
    change_nats: float = 0.0
    loss_nats: float = 0.0
    n_tested: int = 0
    n_alone: int = 0
    n_mixed: int = 0
    n_base: int = 0
    others: Counter[str] = field(default_factory=Counter)

    @property
    def fault(self) -> str:
        """Say in words why it cannot do what it was trained for, or nothing."""
        if self.change_nats < STILL_NATS:
            return "moves nothing: its answers are the base's"
        if not self.loss_nats < NOISE_NATS:  # NaN too
            return "makes noise: everyday words become improbable"
        return ""


def tested_of(folder: Path) -> dict[str, list[Tested]]:
    """Collect the examples of a bundle that have an answer, by who should give it."""
    tested: dict[str, list[Tested]] = {}
    for line in read_lines(read_path(folder)):
        if line.answer is not None and line.text is not None:
            tested.setdefault(line.adapter, []).append((line.text, line.answer))
    return tested


def check_adapters(
    engine: Engine, tested: Mapping[str, Sequence[Tested]], names: Sequence[str]
) -> Iterator[AdapterCheck]:
    """Check adapters one by one; BASE may be among them, which acts in any case.

    tested  by the name of who should answer
    """
    base = _everyday(engine, BASE)
    for name in names:
        check = AdapterCheck(name)
        if name == BASE:
            check.change_nats = STILL_NATS
        else:
            alone = _everyday(engine, f"single:{name}")
            check.change_nats = float(np.abs(alone - base).max())
            check.loss_nats = float((base - alone).mean())
        _ask(engine, check, tested.get(name, ()))
        yield check


def _everyday(engine: Engine, strategy: str) -> F32:
    """Score a few everyday texts: float32 [n_token], log-probabilities in nats."""
    heads = []
    tails = []
    for text in few():
        half = len(text) // 2
        heads.append(text[:half])
        tails.append(text[half:])
    return np.concatenate(engine.score(heads, tails, strategy=strategy))


def _ask(engine: Engine, check: AdapterCheck, tested: Sequence[Tested]) -> None:
    check.n_tested = len(tested)
    check.n_base = _right(engine, tested, BASE)
    check.n_alone = check.n_base
    if check.name != BASE:
        check.n_alone = _right(engine, tested, f"single:{check.name}")
    check.n_mixed = _right(engine, tested, None, check)


def _right(
    engine: Engine,
    tested: Sequence[Tested],
    strategy: str | None,
    check: AdapterCheck | None = None,
) -> int:
    """Count the questions answered right, and in `check` who was taken in its place."""
    requests = [{"prompt": as_turn(question)} for question, _ in tested]
    n_right = 0
    for index, answer in engine.generate_many(requests, strategy=strategy, max_tokens=MAX_TOKENS):
        text = answer.text()
        if BUILT_IN["contains"].score(text, {"answer": tested[index][1]}):
            n_right += 1
        if check is not None:
            taken = _taken(answer.fusion)
            if check.name not in taken:
                check.others["+".join(taken)] += 1
    return n_right


def _taken(fusion: Any) -> list[str]:
    """Name who answers: the adapters that weigh, and who drafted; or the base."""
    taken = list(fusion.chosen)
    step = fusion.plan.drafting
    if step is not None and step.knower != BASE:
        taken.insert(0, step.knower)
    return list(dict.fromkeys(taken)) or [BASE]
