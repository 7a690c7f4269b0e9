"""LoRAHub (arXiv 2307.13269): one number per adapter, found on a few examples without gradients.

As published: weights from -1.5 to 1.5, from 0 on; what is made small is the loss and 0.05 times
the mean of |w|. Not as published: adapters are added up as w scale B A each, where LoRAHub adds up
A and B apart and multiplies the sums, which mixes one adapter's A with another's B; and the search
is CMA-ES by the package cma, which nevergrad, LoRAHub's own, is mostly here.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qaflora_edge.errors import OptionError, OutputFileError, os_errors
from qaflora_edge.files import open_input, write_text_atomic

BOUND = 1.5
L1 = 0.05
BUDGET = 40  # of LoRAHub's own experiments
_STEP = 0.5  # of the first steps: a sixth of the range, nevergrad's default


@dataclass(frozen=True)
class Tried:
    """Weights [n_adapter] and their loss on the examples."""

    weights: tuple[float, ...]
    loss: float

    @property
    def objective(self) -> float:
        """What is made small."""
        return objective(self.weights, self.loss)


@dataclass
class Search:
    """Weights that are tried one after the other; the same seed and losses give the same ones.

    known  what an earlier search tried, in order: its losses are taken as they are
    """

    n_adapter: int
    budget: int = BUDGET
    seed: int = 0
    known: Sequence[Tried] = ()
    tried: list[Tried] = field(default_factory=list)

    def run(self, loss: Callable[[Sequence[float]], float]) -> Iterator[Tried]:
        """Try weights until the budget is spent; gives each when its loss is there.

        loss  weights of the adapters -> mean loss of the examples under them

        Raises OptionError when what searches is not there.
        """
        asked = self._evenly() if self.n_adapter == 1 else self._by_cma()
        for weights in asked:
            if len(self.tried) == self.budget:
                return
            at = len(self.tried)
            is_known = at < len(self.known) and self.known[at].weights == weights
            self.tried.append(self.known[at] if is_known else Tried(weights, loss(weights)))
            yield self.tried[-1]

    @property
    def searcher(self) -> str:
        """What searches, with its version: another may try other weights.

        Raises OptionError when it is not there.
        """
        return "evenly" if self.n_adapter == 1 else f"cma {_cma().__version__}"

    @property
    def best(self) -> Tried:
        """The first of the best so far."""
        return min(self.tried, key=lambda each: each.objective)

    def _evenly(self) -> Iterator[tuple[float, ...]]:
        """0, then the range evenly: what there is to search with one adapter."""
        yield (0.0,)
        for weight in np.linspace(-BOUND, BOUND, self.budget - 1):
            yield (float(weight),)

    def _by_cma(self) -> Iterator[tuple[float, ...]]:
        rng = np.random.default_rng(self.seed)
        start = np.zeros(self.n_adapter)
        options = {
            "bounds": [-BOUND, BOUND],
            "randn": lambda *shape: rng.standard_normal(shape),
            "seed": np.nan,  # numpy's own generator is left alone
            "verbose": -9,
        }
        search = _cma().CMAEvolutionStrategy(start, _STEP, options)
        yield tuple(start.tolist())
        while True:
            n_before = len(self.tried)
            points = search.ask()
            for point in points:
                yield tuple(float(weight) for weight in point)
            search.tell(points, [each.objective for each in self.tried[n_before:]])


def _cma() -> Any:
    try:
        import cma
    except ImportError as error:
        raise OptionError(
            "Weights cannot be searched: the package cma is not installed; install it with "
            "`pip install 'qaflora-edge[fit]'`."
        ) from error
    return cma


def objective(weights: Sequence[float], loss: float) -> float:
    """The loss and LoRAHub's penalty, as its code has it: the mean of |w|, not the sum."""
    return loss + L1 * float(np.abs(weights).mean())


MAX_BYTES = 16 << 20


def read_tried(path: Path, header: Mapping[str, Any]) -> list[Tried]:
    """What the file has of a search with this header, in order; nothing where it is of another.

    A line that was cut off is left out.
    """
    try:
        with open_input(path) as file:
            first, *lines = file.read(MAX_BYTES).split(b"\n")[:-1] or [b""]
        if json.loads(first) != header:
            return []
        return [_tried(json.loads(line)) for line in lines]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return []  # none, or none of ours


def _tried(record: Mapping[str, Any]) -> Tried:
    numbers = [float(number) for number in (*record["weights"], record["loss"])]
    if not all(map(math.isfinite, numbers)):
        raise ValueError("a number is not finite")
    return Tried(tuple(numbers[:-1]), numbers[-1])


@contextmanager
def writing(
    path: Path, header: Mapping[str, Any], tried: Sequence[Tried]
) -> Iterator[Callable[[Tried], None]]:
    """A file of what was tried before, and a function that adds to it; a kill loses no line.

    So a search that was ended goes on where it was.

    Raises OutputFileError when it cannot be written.
    """
    write_text_atomic(path, "".join(map(_line, (header, *map(_record, tried)))))

    def put(each: Tried) -> None:
        file.write(_line(_record(each)))
        file.flush()
        os.fsync(file.fileno())

    advice = "Check that the disk has room and that you may write there."
    with (
        os_errors(OutputFileError, f"Cannot write {path}", advice),
        path.open("a", encoding="utf-8") as file,
    ):
        yield put


def _record(tried: Tried) -> dict[str, Any]:
    return {"weights": list(tried.weights), "loss": tried.loss}


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record) + "\n"
