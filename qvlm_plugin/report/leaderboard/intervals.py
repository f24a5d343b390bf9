"""Rank intervals: the ranks that a run may have, given that documents are a random sample."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

LEVEL = 0.05

_BLOCK = 256
"""Number of runs that are compared with all others at a time."""


@dataclass(frozen=True)
class TaskScores:
    """The documents of one task in several runs.

    Attributes:
        scores: float[runs, n].
        clusters: each document's image, int64[n]; equal numbers are the same image in any task.
    """

    scores: np.ndarray
    clusters: np.ndarray


def rank_intervals(tasks: Sequence[TaskScores], *, higher_is_better: bool) -> list[tuple[int, int]]:
    """The best and the worst rank of each run that the data do not exclude, by the mean of the tasks' means.

    A run ranks below another if their difference is significant by the sign-flip test (`report.significance`). All
    pairs of runs are tested, so the test uses its normal approximation with a correction for continuity (for 0/1 scores
    of independent documents, McNemar's corrected test). Each run's tests are adjusted by Bonferroni for the number of
    other runs, so that a run's interval contains its true rank with a probability of at least 1 - `LEVEL` (Mogstad,
    Romano, Shaikh and Wilhelm 2024, marginal confidence sets).

    Args:
        tasks: one or more tasks with the same runs.
        higher_is_better: whether the highest mean ranks first.
    """
    runs = len(tasks[0].scores)
    if runs == 1:
        return [(1, 1)]
    means = np.mean([task.scores.mean(axis=1, dtype=np.float64) for task in tasks], axis=0)
    means = means if higher_is_better else -means
    step = min(_step(task.scores) / (task.scores.shape[1] * len(tasks)) for task in tasks)
    quantile = NormalDist().inv_cdf(1 - LEVEL / (2 * (runs - 1)))
    sums = _cluster_sums(tasks)
    squares = (sums**2).sum(axis=1)
    intervals = []
    for start in range(0, runs, _BLOCK):
        own = slice(start, start + _BLOCK)
        # The variance of each pair's difference if the signs of all clusters are equally likely.
        variances = squares[own, None] + squares - 2 * sums[own] @ sums.T
        margin = quantile * np.sqrt(np.maximum(variances, 0)) + step
        gains = means[own, None] - means
        better, worse = (gains < -margin).sum(axis=1), (gains > margin).sum(axis=1)
        intervals += [(1 + int(low), runs - int(high)) for low, high in zip(better, worse, strict=True)]
    return intervals


def _cluster_sums(tasks: Sequence[TaskScores]) -> np.ndarray:
    """Each cluster's contribution to each run's mean, float64[runs, clusters]."""
    _, labels = np.unique(np.concatenate([task.clusters for task in tasks]), return_inverse=True)
    sums = np.zeros((len(tasks[0].scores), labels.max() + 1))
    for task, own in zip(tasks, np.split(labels, np.cumsum([len(task.clusters) for task in tasks])[:-1]), strict=True):
        for run, values in enumerate(task.scores / (len(own) * len(tasks))):
            sums[run] += np.bincount(own, weights=values, minlength=sums.shape[1])
    return sums


def _step(scores: np.ndarray) -> float:
    """The smallest difference between two scores of documents; 0 if all are equal."""
    values = np.unique(scores.round(6))
    return float(np.diff(values).min()) if len(values) > 1 else 0.0
