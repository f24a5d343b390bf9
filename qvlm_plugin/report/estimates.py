"""Estimate means over documents that may share images, with standard errors and 95 % intervals."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import special

from qvlm_plugin.report.shares import FEWEST, PERCENT, number_text, score_text, wilson


@dataclass(frozen=True)
class Estimate:
    """A mean with its uncertainty.

    Attributes:
        value: the mean.
        error: its standard error; NaN if a task has fewer than two clusters.
        low, high: the 95 % interval, by Student's t with (clusters - 1) degrees of freedom. It is a large-sample
            interval: too narrow if only a few documents differ.
        wilson: whether the interval is Wilson's; the standard error is then a poor guide.
    """

    value: float
    error: float
    low: float
    high: float
    wilson: bool = False


def without_error(value: float) -> Estimate:
    """A score of unknown accuracy: standard error and interval are NaN."""
    return Estimate(value, np.nan, np.nan, np.nan)


def clustered_mean(values: Sequence[np.ndarray], clusters: Sequence[np.ndarray]) -> Estimate:
    """Unweighted mean of the tasks' means, with a standard error clustered by image.

    To get the variance, deviations from each task's mean are summed within clusters, and the sums are squared and
    added; a task with G clusters is scaled by G/(G - 1) (Liang and Zeger 1986). For one task of independent documents
    this is s²/n.

    Args:
        values: the documents' values of each task, float64[n].
        clusters: the documents' clusters of each task, int[n]; a cluster may span several tasks.
    """
    mean = float(np.mean([task.mean() for task in values]))
    sizes = [len(np.unique(task)) for task in clusters]
    if min(sizes) < 2:
        return without_error(mean)
    deviations = [(task - task.mean()) * np.sqrt(size / (size - 1)) for task, size in zip(values, sizes, strict=True)]
    sums = cluster_sums(deviations, clusters)
    error = float(np.sqrt((sums**2).sum()))
    reach = float(special.stdtrit(len(sums) - 1, 0.975)) * error
    return Estimate(mean, error, mean - reach, mean + reach)


def score_estimate(estimate: Estimate, values: Sequence[np.ndarray], clusters: Sequence[np.ndarray]) -> Estimate:
    """Replace the interval by Wilson's if fewer than `FEWEST` scores differ from 0, or fewer than that from 1.

    Scores outside [0, 1] are left alone. For scores strictly between 0 and 1 the interval is conservative.

    Args:
        estimate: from `clustered_mean`.
        values, clusters: the arguments of `clustered_mean`.
    """
    every = np.concatenate(values)
    if every.min() < 0 or every.max() > 1 or min((every > 0).sum(), (every < 1).sum()) >= FEWEST:
        return estimate
    low, high = wilson(estimate.value, _effective_count(clusters))
    return replace(estimate, low=low, high=high, wilson=True)


def difference_estimate(estimate: Estimate, clusters: Sequence[np.ndarray]) -> Estimate:
    """Add an interval to a mean of differences if all differences are equal, so that their standard error is 0.

    For scores of 0 and 1 it is Tango's score interval (1998). For no difference at all it is as wide as Wilson's
    interval of 0 on either side.

    Args:
        estimate: the mean, from `clustered_mean`, of differences of scores in [0, 1].
        clusters: the argument of `clustered_mean`.
    """
    if estimate.error != 0 or abs(estimate.value) not in (0, 1):
        return estimate
    _, reach = wilson(0, _effective_count(clusters))
    reach *= 1 + abs(estimate.value)
    return replace(estimate, low=max(-1.0, estimate.value - reach), high=min(1.0, estimate.value + reach))


def _effective_count(clusters: Sequence[np.ndarray]) -> float:
    """Number of independent documents that would give the same variance of a share."""
    return len(clusters) ** 2 / sum(1 / len(np.unique(task)) for task in clusters)


def cluster_sums(values: Sequence[np.ndarray], clusters: Sequence[np.ndarray]) -> np.ndarray:
    """Each cluster's contribution to the mean of the tasks' means, float64[clusters]."""
    weighted = np.concatenate([task / (len(task) * len(values)) for task in values])
    _, labels = np.unique(np.concatenate(clusters), return_inverse=True)
    return np.bincount(labels, weights=weighted)


def estimate_data(name: str, estimate: Estimate) -> dict[str, float | None]:
    """An estimate as JSON data; None for what is unknown."""
    values = {name: estimate.value, f"{name}_stderr": estimate.error}
    values |= {f"{name}_low": estimate.low, f"{name}_high": estimate.high}
    return {key: value if np.isfinite(value) else None for key, value in values.items()}


def estimate_text(estimate: Estimate, scale: int) -> str:
    """A score for a table, with its standard error or Wilson's interval if known."""
    return score_text(estimate.value, estimate.error, scale, (estimate.low, estimate.high) if estimate.wilson else None)


def difference_text(estimate: Estimate, scale: int, decimals: int = 2) -> str:
    """A difference for a table, with its interval if known; differences of shares are in points."""
    ends = [estimate.low, estimate.high]
    ends = [min(max(end, -1.0), 1.0) for end in ends] if scale == PERCENT else ends
    value, low, high = (number_text(number, scale, decimals, signed=True) for number in (estimate.value, *ends))
    return value if np.isnan(estimate.error) else f"{value} [{low}, {high}]"
