"""Joint search of the rounding functions of a block (Eq. 3), with shared prefixes.

A block is a sequence of *steps*; each step has the same candidates. Running a candidate of step k on the state that
steps 0 … k-1 left gives a new state, and the state after the last step is judged. All combinations of c candidates over
d steps are tried as a tree, which costs c + c² + … + c^d step runs instead of d · c^d.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

State = TypeVar("State")


@dataclass(frozen=True)
class Found:
    """The best combination.

    Attributes:
        choices: the candidate's index for each step.
        error: the objective after the last step.
    """

    choices: tuple[int, ...]
    error: float


def search_exhaustively(
    steps: int,
    candidates: int,
    start: State,
    run: Callable[[int, int, State], State],
    error: Callable[[int, State], float],
    first: int = 0,
) -> Found:
    """Try every combination, depth first; holds one state per step. Ties keep the lexicographically first choices.

    Args:
        steps: d.
        candidates: c.
        start: the state before the first step.
        run: (step, candidate, state) → next state.
        error: (step, state) → objective; called for the last step only.
        first: the step to begin with.
    """
    best = None
    for candidate in range(candidates):
        after = run(first, candidate, start)
        if first + 1 == steps:
            found = Found((candidate,), error(first, after))
        else:
            rest = search_exhaustively(steps, candidates, after, run, error, first + 1)
            found = Found((candidate, *rest.choices), rest.error)
        if best is None or found.error < best.error:
            best = found
    return best


def search_with_beam(
    steps: int,
    candidates: int,
    start: State,
    run: Callable[[int, int, State], State],
    error: Callable[[int, State], float],
    width: int,
) -> Found:
    """Keep the ``width`` best prefixes after each step; with a width of c^(d-1) or more it is exhaustive.

    Costs at most c + (d - 1) · width · c step runs and holds 2 · width + 1 states. Arguments as for
    `search_exhaustively`; ``error`` is called after every step, on prefixes.
    """
    beam: list[tuple[float, tuple[int, ...], State]] = [(0.0, (), start)]
    for step in range(steps):
        grown: list[tuple[float, tuple[int, ...], State]] = []
        for _, choices, state in beam:
            for candidate in range(candidates):
                after = run(step, candidate, state)
                # Only states that may survive are kept; sorting by error and choices never compares states.
                grown = sorted(
                    [*grown, (error(step, after), (*choices, candidate), after)], key=lambda entry: entry[:2]
                )[:width]
        beam = grown
    value, choices, _ = beam[0]
    return Found(choices, value)
