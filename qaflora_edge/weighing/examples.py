"""Examples: questions whose adapter is known say who answers questions like them.

A ridge regression of the base's states onto adapters and "nobody". Generic questions belong to
nobody. The ways in which one of them differs from itself, as JSON or behind a system prompt, are
projected out, so that an example counts in other forms and languages too (method.md section 10).
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qaflora_edge.arrays import F32, F64
from qaflora_edge.weighing.plan import BASE
from qaflora_edge.weighing.strategy import Closeness

RIDGE = 0.3
N_NUISANCE = 10  # directions that are projected out


@dataclass(frozen=True)
class Example:
    """Hold a question, or a description, of an adapter or BASE.

    states  [2, n_embd], as weighing.added.Heard has them; of a description the first is 0
    """

    adapter: str
    states: F32
    is_about: bool = False


@dataclass(frozen=True)
class Examples:
    """Compare queries with examples.

    n_example  example questions of each adapter, and of BASE where it has some
    weights    [2 * n_embd, 1 + n_name]: columns are nobody, then the names of n_example
    """

    n_example: Mapping[str, int]
    weights: F32

    def close(self, states: F32, adapters: Iterable[str]) -> dict[str, Closeness]:
        """Tell how close a query is to the examples of these adapters, where they have some.

        states  [2, n_embd] of the query
        """
        of_nobody, *scores = (states.ravel() @ self.weights).tolist()
        in_use = {BASE, *adapters}
        by_name = {}
        for name, score in zip(self.n_example, scores, strict=True):
            if name in in_use:
                by_name[name] = score
        closeness = {}
        for name, score in by_name.items():
            others = [other for rival, other in by_name.items() if rival != name]
            over_next = score - max(others, default=0.0)
            closeness[name] = Closeness(score - of_nobody, over_next, self.n_example[name])
        return closeness


def fit(examples: Sequence[Example], generic: Sequence[F32]) -> Examples:
    """Fit examples of adapters and of BASE.

    generic  of each generic question: [n_dress, 2, n_embd]
    """
    counts = Counter(example.adapter for example in examples)
    names = list(counts)
    column = {name: index for index, name in enumerate(names, 1)}
    rows = [example.states.ravel() for example in examples]
    owners = [column[example.adapter] for example in examples]
    shares = balanced(counts)
    row_weights = [shares[example.adapter] for example in examples]
    for states in generic:
        rows += [state.ravel() for state in states]
        owners += [0] * len(states)
        row_weights += [1.0] * len(states)
    targets = np.eye(1 + len(names))[owners]  # [n_row, n_column]
    apart = projected(np.array(rows, np.float64), nuisance(generic))
    weights = ridge(apart, targets, np.array(row_weights))
    n_example = dict.fromkeys(names, 0)
    for example in examples:
        if not example.is_about:
            n_example[example.adapter] += 1
    return Examples(n_example, np.asarray(weights, np.float32))


def balanced(counts: Mapping[str, int]) -> dict[str, float]:
    """Weigh the examples of each adapter so that all adapters count the same, however many it has.

    Where all have the same number each example weighs 1.
    """
    usual = np.exp(np.mean(np.log(list(counts.values()))))
    return {name: float(usual) / count for name, count in counts.items()}


def nuisance(generic: Sequence[F32]) -> F64:
    """Find the main directions in which a question differs among its dresses.

    generic  of each question: [n_dress, 2, n_embd]
    returns  [n_direction, 2 * n_embd], orthonormal
    """
    differences = []
    for states in generic:
        flat = states.reshape(len(states), -1).astype(np.float64)
        differences.append(flat - flat.mean(axis=0))
    if not differences:
        return np.zeros((0, 1))
    _, sizes, directions = np.linalg.svd(np.concatenate(differences), full_matrices=False)
    is_one = sizes > 1e-6
    return np.asarray(directions[is_one][:N_NUISANCE])


def projected(rows: F64, directions: F64) -> F64:
    """Take orthonormal directions [n_direction, n] out of rows [n_row, n]."""
    if not len(directions):
        return rows
    return np.asarray(rows - (rows @ directions.T) @ directions)


def ridge(rows: F64, targets: F64, row_weights: F64) -> F64:
    """Solve a weighted ridge regression without an intercept: [n, n_column].

    rows  [n_row, n]; targets [n_row, n_column]; row_weights [n_row]

    Of n_row and n the smaller one sizes the system that is solved.
    """
    roots = np.sqrt(row_weights)[:, None]
    scaled = rows * roots
    n_row, n = scaled.shape
    if n_row <= n:
        gram = scaled @ scaled.T + RIDGE * np.eye(n_row)
        return np.asarray(scaled.T @ np.linalg.solve(gram, targets * roots))
    covariance = scaled.T @ scaled + RIDGE * np.eye(n)
    return np.asarray(np.linalg.solve(covariance, scaled.T @ (targets * roots)))
