import numpy as np
import pytest

from qvlm_plugin.report.estimates import cluster_sums
from qvlm_plugin.report.leaderboard.intervals import LEVEL, TaskScores, rank_intervals
from qvlm_plugin.report.significance import sign_flip_p


def task(scores, clusters=None):
    scores = np.asarray(scores, np.float32)
    return TaskScores(scores, np.arange(scores.shape[1]) if clusters is None else np.asarray(clusters))


def drawn(seed, runs, documents, spread):
    """0/1 scores of runs that mostly agree."""
    generator = np.random.default_rng(seed)
    hardness = generator.random(documents)
    levels = 0.5 + generator.uniform(-spread, spread, runs)
    return (hardness + generator.normal(0, 0.1, (runs, documents)) < levels[:, None]).astype(np.float32)


@pytest.mark.parametrize("seed", range(5))
def test_intervals_hold_the_ranks_and_agree_with_the_exact_test(seed):
    scores = drawn(seed, 12, 400, 0.1)
    intervals = rank_intervals([task(scores)], higher_is_better=True)
    means = scores.mean(axis=1)
    level = LEVEL / (len(scores) - 1)
    for run, (low, high) in enumerate(intervals):
        assert low <= 1 + (means > means[run]).sum() <= high
        sums = [cluster_sums([other - scores[run]], [np.arange(400)]) for other in scores]
        ps = np.array([sign_flip_p(one) for one in sums])
        # The normal approximation may decide otherwise only close to the level.
        sure, maybe = ps < level / 2, ps < level * 2
        assert 1 + (sure & (means > means[run])).sum() <= low <= 1 + (maybe & (means > means[run])).sum()
        assert 12 - (maybe & (means < means[run])).sum() <= high <= 12 - (sure & (means < means[run])).sum()


def test_equal_runs_share_all_ranks_and_clear_ones_have_one():
    same = drawn(0, 1, 50, 0)
    assert rank_intervals([task(np.repeat(same, 4, axis=0))], higher_is_better=True) == [(1, 4)] * 4
    clear = np.stack([np.ones(300), np.r_[np.ones(150), np.zeros(150)], np.zeros(300)])
    assert rank_intervals([task(clear)], higher_is_better=True) == [(1, 1), (2, 2), (3, 3)]
    assert rank_intervals([task(clear)], higher_is_better=False) == [(3, 3), (2, 2), (1, 1)]
    assert rank_intervals([task(clear[:1])], higher_is_better=True) == [(1, 1)]


def test_copies_within_clusters_keep_the_interval_and_independent_copies_narrow_it():
    scores = drawn(3, 8, 200, 0.06)
    once = rank_intervals([task(scores)], higher_is_better=True)
    thrice = np.tile(scores, 3)
    # Only the correction for continuity, a third of what it was, can tell them apart.
    clustered = rank_intervals([task(thrice, np.tile(np.arange(200), 3))], higher_is_better=True)
    assert (
        sum(abs(a - b) for one, other in zip(once, clustered, strict=True) for a, b in zip(one, other, strict=True))
        <= 4
    )
    width = [
        sum(high - low for low, high in found)
        for found in (once, rank_intervals([task(thrice)], higher_is_better=True))
    ]
    assert width[1] < width[0]


def test_order_of_runs_and_of_documents_does_not_matter():
    scores = drawn(4, 300, 120, 0.2)  # more than one block of runs
    intervals = rank_intervals([task(scores)], higher_is_better=True)
    order = np.random.default_rng(0).permutation(300)
    assert rank_intervals([task(scores[order])], higher_is_better=True) == [intervals[run] for run in order]
    assert rank_intervals([task(scores[:, ::-1])], higher_is_better=True) == intervals


def test_the_mean_of_tasks_weighs_them_equally():
    strong, weak = np.r_[np.ones(90), np.zeros(10)], np.r_[np.ones(10), np.zeros(90)]
    long, short = np.stack([strong, weak]), np.stack([np.zeros(20), np.ones(20)])
    assert rank_intervals([task(long)], higher_is_better=True) == [(1, 1), (2, 2)]
    both = rank_intervals([task(long, np.arange(100)), task(short, 100 + np.arange(20))], higher_is_better=True)
    assert both == [(1, 2), (1, 2)]  # 80 points in one, -100 in the other
    shared = rank_intervals([task(long), task(long)], higher_is_better=True)  # the same images: no more is known
    assert shared == [(1, 1), (2, 2)]
