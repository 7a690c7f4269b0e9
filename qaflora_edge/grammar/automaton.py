"""A regular expression as a deterministic automaton, and that as GBNF.

The library's grammar sampler follows every way to read a text at once, and the ways of an
expression as it is written can be too many. Of an automaton there is always one.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass

from qaflora_edge.grammar.char_set import Ranges, in_json, union

MAX_STATES = 4000
MAX_STEPS = 200_000  # of finding them


@dataclass(frozen=True)
class Chars:
    """One character out of a set."""

    ranges: Ranges


@dataclass(frozen=True)
class Repeat:
    """From `low` to `high` of something; None is without end."""

    item: Node
    low: int
    high: int | None


@dataclass(frozen=True)
class Run:
    """One thing after another."""

    items: tuple[Node, ...]


@dataclass(frozen=True)
class Choice:
    """One of some."""

    options: tuple[Node, ...]


Node = Chars | Repeat | Run | Choice


class TooManyStates(Exception):
    """The automaton would be larger than MAX_STATES."""


class _Nfa:
    """States as numbers: where each leads without a character, and with one."""

    def __init__(self, node: Node) -> None:
        self.free: list[list[int]] = []
        self.steps: list[list[tuple[Ranges, int]]] = []
        self.start = self._new()
        self.end = self._add(node, self.start)

    def _new(self) -> int:
        if len(self.free) > MAX_STATES * 10:
            raise TooManyStates
        self.free.append([])
        self.steps.append([])
        return len(self.free) - 1

    def _add(self, node: Node, start: int) -> int:
        """Add a node from a state on; returns the state behind it."""
        if isinstance(node, Chars):
            end = self._new()
            self.steps[start].append((node.ranges, end))
            return end
        if isinstance(node, Run):
            for item in node.items:
                start = self._add(item, start)
            return start
        end = self._new()
        if isinstance(node, Choice):
            for option in node.options:
                before = self._new()
                self.free[start].append(before)
                self.free[self._add(option, before)].append(end)
            return end
        for _ in range(node.low):
            start = self._add(node.item, start)
        for _ in range(0 if node.high is None else node.high - node.low):
            self.free[start].append(end)
            start = self._add(node.item, start)
        if node.high is None:
            loop = self._new()
            self.free[start].append(loop)
            self.free[self._add(node.item, loop)].append(loop)
            start = loop
        self.free[start].append(end)
        return end

    def closure(self, states: Iterable[int]) -> frozenset[int]:
        found = set(states)
        todo = list(found)
        while todo:
            for state in self.free[todo.pop()]:
                if state not in found:
                    found.add(state)
                    todo.append(state)
        return frozenset(found)


def _steps_of(nfa: _Nfa, states: frozenset[int]) -> dict[frozenset[int], list[tuple[int, int]]]:
    """Where a set of states leads: each next set, and the characters that lead there."""
    steps = [step for state in states for step in nfa.steps[state]]
    edges = sorted({edge for ranges, _ in steps for a, b in ranges for edge in (a, b + 1)})
    reached: list[set[int]] = [set() for _ in edges]
    for ranges, target in steps:
        for low, high in ranges:
            for i in range(bisect_right(edges, low) - 1, bisect_right(edges, high)):
                reached[i].add(target)
    found: dict[frozenset[int], list[tuple[int, int]]] = {}
    for i, targets in enumerate(reached):
        if targets:
            following = nfa.closure(targets)
            found.setdefault(following, []).append((edges[i], edges[i + 1] - 1))
    return found


_State = tuple[frozenset[int], int]  # of the automaton, and characters so far


def regular_rules(node: Node, low: int, high: int | None, prefix: str) -> dict[str, str]:
    """GBNF rules for the texts that a node allows, as they stand between a JSON string's quotes.

    low, high  least and most characters; None is without end
    returns    name -> rule, the first of which is the start and has the name `prefix`; none if
               nothing fits

    Raises TooManyStates.
    """
    nfa = _Nfa(node)
    start = (nfa.closure([nfa.start]), 0)
    steps: dict[frozenset[int], dict[frozenset[int], list[tuple[int, int]]]] = {}
    arrows: dict[_State, list[tuple[str, _State]]] = {}
    todo, n_step = [start], 0
    while todo:
        here = todo.pop()
        if here in arrows:
            continue
        states, n_char = here
        if states not in steps:
            steps[states] = _steps_of(nfa, states)
            n_step += len(states)
        if len(arrows) >= MAX_STATES or n_step > MAX_STEPS:
            raise TooManyStates
        arrows[here] = []
        if n_char == high:
            continue
        for following, ranges in steps[states].items():
            if text := in_json(union([tuple(ranges)])):
                there = (following, min(n_char + 1, low if high is None else high))
                arrows[here].append((text, there))
                todo.append(there)
    ends = {at for at in arrows if nfa.end in at[0] and at[1] >= low}
    return _rules(start, arrows, ends, prefix)


def _rules(
    start: _State, arrows: dict[_State, list[tuple[str, _State]]], ends: set[_State], prefix: str
) -> dict[str, str]:
    """A rule per state that an end can be reached from."""
    before: dict[_State, list[_State]] = {}
    for here, found in arrows.items():
        for _, there in found:
            before.setdefault(there, []).append(here)
    alive, todo = set(ends), list(ends)
    while todo:
        for state in before.get(todo.pop(), ()):
            if state not in alive:
                alive.add(state)
                todo.append(state)
    if start not in alive:
        return {}
    names = {state: f"{prefix}-{i}" for i, state in enumerate(arrows) if state in alive}
    names[start] = prefix
    rules = {}
    for state, name in names.items():
        options = [f"{text} {names[to]}" for text, to in arrows[state] if to in alive]
        rules[name] = " | ".join(options + ['""'] * (state in ends))
    return rules
