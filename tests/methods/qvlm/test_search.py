import itertools
import random

import pytest

from qvlm_plugin.methods.qvlm.search import Tree, search_exhaustively, search_pruned, search_with_beam


def problem(seed, candidates=4):
    """A random objective over choices, and how often steps were run."""
    table = random.Random(seed)
    values, runs = {}, []

    def run(step, candidate, state):
        runs.append(step)
        assert len(state) == step
        return (*state, candidate)

    def error(step, state):
        return values.setdefault(state, table.random())

    return run, error, runs


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_exhaustive_search_equals_trying_everything(steps):
    run, error, runs = problem(steps)
    found = search_exhaustively(Tree(steps, 4, run, error), ())
    combinations = list(itertools.product(range(4), repeat=steps))
    assert found.error == min(error(steps - 1, choices) for choices in combinations)
    assert error(steps - 1, found.choices) == found.error
    assert len(runs) == sum(4**depth for depth in range(1, steps + 1))  # prefixes are shared


def test_a_wide_beam_is_exhaustive_and_a_narrow_one_runs_less():
    run, error, _ = problem(7)
    exact = search_exhaustively(Tree(3, 4, run, error), ())
    assert search_with_beam(Tree(3, 4, run, error), (), 16) == exact
    run, error, runs = problem(7)
    assert search_with_beam(Tree(3, 4, run, error), (), 2).error >= exact.error
    assert len(runs) == 4 + 8 + 8


def test_ties_keep_the_first_candidate():
    tree = Tree(3, 5, lambda step, c, state: (*state, c), lambda step, state: 1.0)
    assert search_exhaustively(tree, ()).choices == search_with_beam(tree, (), 2).choices == (0, 0, 0)


class State:
    """Something of which as many are counted as are alive."""

    def __init__(self, alive):
        self.alive = alive
        alive.append(len(alive) + 1)

    def __del__(self):
        self.alive.pop()


@pytest.mark.parametrize("width, most", [(0, 4), (1, 3), (2, 5), (3, 7)])
def test_only_states_that_may_survive_are_kept(width, most):
    table, alive, peak = random.Random(0), [], []

    def run(step, candidate, state):
        made = State(alive)
        peak.append(len(alive))
        return made

    tree = Tree(4, 5, run, lambda step, state: table.random())
    search_with_beam(tree, None, width) if width else search_exhaustively(tree, None)
    assert max(peak) == most and not alive


def test_joint_search_is_never_worse_than_choosing_step_by_step():
    for seed in range(20):
        run, error, _ = problem(seed)
        greedy = search_with_beam(Tree(3, 4, run, error), (), 1)
        assert search_exhaustively(Tree(3, 4, run, error), ()).error <= greedy.error


def test_pruning_judges_all_on_a_part_and_the_best_of_them_on_all():
    errors = {choices: random.Random(str(choices)).random() for choices in itertools.product(range(4), repeat=3)}
    noisy = {choices: error + 0.05 * random.Random(error).random() for choices, error in errors.items()}
    runs = []

    def run(step, candidate, state):
        runs.append((step, candidate))
        return (*state, candidate)

    part = Tree(3, 4, lambda step, candidate, state: (*state, candidate), lambda step, state: noisy[state])
    whole = Tree(3, 4, run, lambda step, state: errors[state])
    found = search_pruned(part, (), whole, ())
    shortlist = sorted(noisy, key=noisy.get)[:4]
    assert found.choices == min(shortlist, key=errors.get) and found.error == errors[found.choices]
    assert len(runs) <= 4 * 3  # and shares prefixes: no more than these
    same = search_pruned(whole, (), whole, ())
    assert same == search_exhaustively(whole, ())
