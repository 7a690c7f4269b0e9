"""Weights by layer, in a Markdown document: by the roles of adapters, and by task."""

from collections.abc import Sequence

import numpy as np

from qaflora_edge.arrays import F64
from qaflora_edge.cli.eval_words import NONE, plain
from qaflora_edge.cli.show import BLOCKS
from qaflora_edge.cli.tables import folded, table
from qaflora_edge.evaluation.cells import BASE, SINGLE, STATIC
from qaflora_edge.evaluation.patterns import ROLES, Profile, coherence, profiles, thirds
from qaflora_edge.evaluation.summary import Summary

WORDS = (
    "Means over tasks of what the adapter of the task's domain, and that of its language, weigh in "
    "a part of the layers; and the correlation over layers of these weights in two tasks: of the "
    "same domain (or language), and of different ones."
)


def layer_lines(summary: Summary) -> list[str]:
    """A table of all strategies that weigh layers differently, then each by task, folded."""
    cells = [cell.cell for cell in summary.cells]
    found = {
        strategy: kept
        for strategy in summary.section.strategies
        if strategy not in (BASE, STATIC) and not strategy.startswith(SINGLE)
        if (kept := [each for each in profiles(cells, strategy) if _is_layered(each)])
    }
    if not found:
        return []
    rows = [row for strategy, each in found.items() for row in _roles(strategy, each)]
    parts = thirds(len(next(iter(found.values()))[0].by_role[ROLES[0]]))
    head = ("", "adapter of the", *parts, "same", "different", "pairs")
    lines = ["### Weights by layer", "", WORDS, "", *table(head, rows), ""]
    for strategy, each in found.items():
        lines += folded(f"{strategy}, by task", [*_strips(each), "", *_by_task(each), ""])
    return lines


def _is_layered(profile: Profile) -> bool:
    return any(np.ptp(line) > 0 for line in profile.by_role.values())


def _roles(strategy: str, found: Sequence[Profile]) -> list[tuple[str, ...]]:
    rows = []
    for role in ROLES:
        mean = np.mean([each.by_role[role] for each in found], axis=0)
        agreed = coherence(found, role)
        rows.append(
            (
                strategy,
                role,
                *_parts(mean),
                f"{agreed.same:.2f}" if agreed.n_same else NONE,
                f"{agreed.other:.2f}" if agreed.n_other else NONE,
                f"{agreed.n_same}, {agreed.n_other}",
            )
        )
    return rows


def _parts(line: F64) -> list[str]:
    return [f"{line[part].mean():.2f}" for part in thirds(len(line)).values()]


def _by_task(found: Sequence[Profile]) -> list[str]:
    rows = [
        (each.cell.name, f"{role}: {each.cell.role(role)}", *_parts(each.by_role[role]))
        for each in found
        for role in ROLES
    ]
    return table(("task", "adapter", *thirds(1)), rows)


def _strips(found: Sequence[Profile]) -> list[str]:
    """A sign for each layer, from layer 0 to the left; all on one scale."""
    most = float(max(line.max() for each in found for line in each.by_role.values()))
    width = max(len(plain(each.cell.name)) for each in found)
    lines = ["```text", f"{'':{width}}  {'':8} layer 0 to the last; {BLOCKS[-1]} is {most:.2f}"]
    for each in found:
        for role in ROLES:
            name = plain(each.cell.name).replace("`", "'") if role == ROLES[0] else ""
            lines.append(f"{name:{width}}  {role:8} {_strip(each.by_role[role], most)}")
    return [*lines, "```"]


def _strip(line: F64, most: float) -> str:
    steps = np.clip(line / (most or 1.0) * len(BLOCKS), 0, len(BLOCKS) - 1).astype(int)
    return "".join(BLOCKS[step] for step in steps)
