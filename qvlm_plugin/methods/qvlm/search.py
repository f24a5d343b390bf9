"""Joint search of the rounding functions of a block (Eq. 3), with shared prefixes.

A block is a sequence of *steps*; each step has the same candidates. Running a candidate of step k on the state after
steps 0 … k-1 gives a new state, and the objective is computed from the state after the last step. All combinations of c
candidates over d steps form a tree, which costs c + c² + … + c^d step runs instead of d · c^d.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

State = TypeVar("State")


@dataclass(frozen=True)
class Tree(Generic[State]):
    """All combinations of candidates.

    Attributes:
        steps: d.
        candidates: c, the same number at each step.
        run: (step, candidate, state) → next state.
        error: (step, state) → objective.
    """

    steps: int
    candidates: int
    run: Callable[[int, int, State], State]
    error: Callable[[int, State], float]


@dataclass(frozen=True)
class Found(Generic[State]):
    """The best combination.

    Attributes:
        choices: the candidate's index for each step.
        error: the objective after the last step.
        state: the state after the last step; None if the search no longer has it.
    """

    choices: tuple[int, ...]
    error: float
    state: State | None = field(default=None, compare=False)


def combinations(tree: Tree[State], start: State, first: int = 0) -> Iterator[Found]:
    """Every combination with its error, depth first, in lexicographical order; holds one state per step.

    Args:
        tree: its error is computed after the last step only.
        start: the state before the first step.
        first: the step to begin with.
    """
    for candidate in range(tree.candidates):
        after = None  # frees the last candidate's state before the next one is computed
        after = tree.run(first, candidate, start)
        if first + 1 == tree.steps:
            yield Found((candidate,), tree.error(first, after))
        else:
            for rest in combinations(tree, after, first + 1):
                yield Found((candidate, *rest.choices), rest.error)


def search_exhaustively(tree: Tree[State], start: State) -> Found:
    """The best of all combinations, of equal ones the lexicographically first; for arguments see `combinations`."""
    return min(combinations(tree, start), key=lambda found: found.error)


def search_pruned(part: Tree[State], part_start: State, whole: Tree[State], start: State) -> Found:
    """Evaluate all combinations on a part of the data, and the best c of them (c: candidates per step) on all data.

    Args:
        part, part_start: the tree and its first state on the part.
        whole, start: the same on all data.
    """
    ranked = sorted(combinations(part, part_start), key=lambda found: found.error)
    best: Found | None = None
    before: tuple[int, ...] = ()
    path: list[State] = []
    for choices in sorted(found.choices for found in ranked[: part.candidates]):
        del path[next((step for step, old in enumerate(before) if choices[step] != old), len(before)) :]
        for step in range(len(path), whole.steps):
            path.append(whole.run(step, choices[step], path[-1] if path else start))
        error = whole.error(whole.steps - 1, path[-1])
        if best is None or error < best.error:
            best = Found(choices, error)
        before = choices
    return best


def search_with_beam(tree: Tree[State], start: State, width: int) -> Found:
    """Keep the ``width`` best prefixes after each step; with a width of c^(d-1) or more the search is exhaustive.

    Costs at most c + (d - 1) · width · c step runs and holds 2 · width + 1 states.

    Args:
        tree: its error is computed after every step, on prefixes.
        start: the state before the first step.
        width: number of prefixes.
    """
    beam: list[tuple[float, tuple[int, ...], State]] = [(0.0, (), start)]
    for step in range(tree.steps):
        grown: list[tuple[float, tuple[int, ...], State]] = []
        for _, choices, state in beam:
            for candidate in range(tree.candidates):
                after = entry = None  # frees the last candidate's state before the next one is computed
                after = tree.run(step, candidate, state)
                entry = tree.error(step, after), (*choices, candidate), after
                # Only states that may survive are kept; sorting by error and choices never compares states.
                grown = sorted([*grown, entry], key=lambda item: item[:2])[:width]
        beam = grown
    value, choices, state = beam[0]
    return Found(choices, value, state)
