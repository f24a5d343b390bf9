"""Compare two methods over several seeds of the calibration draw."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

import numpy as np
from scipy import stats

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.report.estimates import (
    Estimate,
    cluster_sums,
    clustered_mean,
    difference_estimate,
    score_estimate,
    without_error,
)
from qvlm_plugin.report.paired import AVERAGE, Flips, PairedTask, count_flips, paired_tasks, total_means
from qvlm_plugin.report.samples import RunSamples
from qvlm_plugin.report.shares import PERCENT, number_text
from qvlm_plugin.report.significance import sign_flip_p

LEVEL = 0.05


@dataclass(frozen=True)
class Pooled:
    """Runs of several seeds compared with their baselines on one task, or on the average of all tasks.

    Attributes:
        task: the task's name, or `AVERAGE`.
        documents, clusters: their numbers, each counted once; documents with the same image form one cluster.
        unknown: number of documents whose image no run records, as in `Comparison`.
        scale: factor by which tables multiply scores and differences: `shares.scale`.
        scores, differences: one for each seed, in the order given; differences are score minus baseline.
        baseline, score, difference: means over seeds, with errors and 95 % intervals from `two_way_mean`.
        t_p: two-sided p for no difference by the t statistic of `difference`, with documents and seeds as random. It
            equals ``sign_flip_p`` if the standard error is 0 or unknown.
        sign_flip_p: p of the sign-flip test on the clusters' differences, averaged over seeds: documents are random,
            the draws of calibration samples are fixed.
        flips: numbers of changed documents, summed over seeds.
        drawn: whether any run used calibration samples.
    """

    task: str
    documents: int
    clusters: int
    unknown: int
    scale: int
    scores: tuple[float, ...]
    differences: tuple[float, ...]
    baseline: Estimate
    score: Estimate
    difference: Estimate
    t_p: float
    sign_flip_p: float
    flips: Flips
    drawn: bool

    @property
    def seeds(self) -> int:
        """Number of seeds."""
        return len(self.differences)

    @property
    def shown(self) -> tuple[float, float, float]:
        """The score and the ends of its 95 % interval as figures show them; without an interval, the score itself."""
        score = self.score
        ends = (score.low, score.high) if isfinite(score.low) else (score.value, score.value)
        return self.scale * score.value, self.scale * ends[0], self.scale * ends[1]

    @property
    def spread(self) -> float | None:
        """Standard deviation of the scores over seeds; None for one seed."""
        return float(np.std(self.scores, ddof=1)) if self.seeds > 1 else None

    @property
    def agreeing(self) -> int:
        """Number of seeds whose difference has the sign of the pooled difference."""
        return sum(_sign(difference) == _sign(self.difference.value) for difference in self.differences)

    @property
    def holds(self) -> bool:
        """Whether the interval excludes 0 and all seeds agree in sign."""
        # p < 0.05 means that the interval excludes 0. Without an interval, t_p is that of the sign-flip test.
        return self.t_p < LEVEL and self.agreeing == self.seeds


def pool(pairs: Sequence[tuple[RunSamples, RunSamples]], metric: str) -> list[Pooled]:
    """Compare runs with their baselines over several seeds.

    Args:
        pairs: (baseline, other) of each seed. All runs must cover the same documents. The run of a method without
            calibration may be in every pair.
        metric: name of the tasks' metric.

    Returns:
        A row for each task that has the metric and, if there are several, one for their average.

    Raises:
        QVLMError: there is no pair, the runs do not cover the same documents, or the metric is missing.
    """
    if not pairs:
        raise QVLMError("there are no runs to compare")
    tasks = paired_tasks(pairs, metric)
    drawn = any((run.run or {}).get("calibration") for pair in pairs for run in pair)
    rows = [_pooled(task, [own], drawn) for task, own in tasks.items()]
    return rows if len(rows) == 1 else [*rows, _pooled(AVERAGE, [*tasks.values()], drawn)]


def _pooled(name: str, tasks: Sequence[PairedTask], drawn: bool) -> Pooled:
    clusters = [task.clusters for task in tasks]
    differences = [task.differences for task in tasks]
    difference, degrees = two_way_mean(differences, clusters)
    baselines, scores = [task.baseline for task in tasks], [task.score for task in tasks]
    baseline, score = (two_way_mean(values, clusters)[0] for values in (baselines, scores))
    by_seed = total_means(tasks)
    if any(task.totals is not None for task in tasks):
        baseline, score, difference = (without_error(float(means.mean())) for means in by_seed)
    elif min(task.scale for task in tasks) == PERCENT:
        baseline, score = _share(baseline, baselines, clusters), _share(score, scores, clusters)
        difference = difference_estimate(difference, clusters)
    flipped = sign_flip_p(cluster_sums([task.mean(axis=0) for task in differences], clusters))
    return Pooled(
        task=name,
        documents=sum(map(len, clusters)),
        clusters=len(np.unique(np.concatenate(clusters))),
        unknown=sum(task.unknown for task in tasks),
        scale=min(task.scale for task in tasks),
        scores=tuple(by_seed[1].tolist()),
        differences=tuple(by_seed[2].tolist()),
        baseline=baseline,
        score=score,
        difference=difference,
        t_p=_t_p(difference, degrees) if difference.error > 0 else flipped,
        sign_flip_p=flipped,
        flips=count_flips(tasks),
        drawn=drawn,
    )


def _share(estimate: Estimate, values: Sequence[np.ndarray], clusters: Sequence[np.ndarray]) -> Estimate:
    """The `two_way_mean` of shares, with the interval of `score_estimate` if seeds add no variance."""
    if len(values[0]) > 1 and estimate.error > 0:
        return estimate
    return score_estimate(estimate, [task.mean(axis=0) for task in values], clusters)


def two_way_mean(values: Sequence[np.ndarray], clusters: Sequence[np.ndarray]) -> tuple[Estimate, float]:
    """Mean over seeds and tasks, tasks unweighted, with a standard error that treats documents and seeds as random.

    The variance has two parts: that of `clustered_mean` for the documents' values averaged over seeds, and the sample
    variance of the seeds' means, divided by the number of seeds. This is two-way clustering (Cameron, Gelbach and
    Miller 2011) without subtracting the interaction of documents and seeds, which both parts contain, so the error is
    conservative. The interval is Student's with Satterthwaite's degrees of freedom, from (clusters - 1) and
    (seeds - 1). A few seeds that differ much give few degrees of freedom, and wide intervals.

    The variance over seeds cannot be estimated from one seed: the result is then that of `clustered_mean`, which does
    *not* cover the variation between draws of calibration samples.

    Args:
        values: the documents' values of each task by seed, float64[seeds, n].
        clusters: the documents' clusters of each task, int[n]; a cluster may span several tasks.

    Returns:
        The mean, and the degrees of freedom; error and interval are NaN if a task has fewer than two clusters.
    """
    of_documents = clustered_mean([task.mean(axis=0) for task in values], clusters)
    documents, freedom = of_documents.error**2, len(np.unique(np.concatenate(clusters))) - 1
    means = _means(values)
    if len(means) == 1 or not documents >= 0:
        return of_documents, freedom
    seeds = float(means.var(ddof=1)) / len(means)
    total = documents + seeds
    if total > 0:
        freedom = total**2 / (documents**2 / freedom + seeds**2 / (len(means) - 1))
    mean, error = of_documents.value, float(np.sqrt(total))
    reach = float(stats.t.ppf(0.975, freedom)) * error
    return Estimate(mean, error, mean - reach, mean + reach), freedom


def _means(values: Sequence[np.ndarray]) -> np.ndarray:
    """The seeds' means over tasks, float64[seeds]."""
    return np.mean([task.mean(axis=1) for task in values], axis=0)


def _t_p(estimate: Estimate, freedom: float) -> float:
    return float(2 * stats.t.sf(abs(estimate.value) / estimate.error, freedom))


def _sign(difference: float) -> int:
    return int(np.sign(round(difference, 12)))  # differences that cancel leave rounding errors


def spread_text(row: Pooled) -> str:
    """Standard deviation, lowest and highest of the scores over seeds, for a table; empty for one seed."""
    if row.spread is None:
        return ""
    spread, low, high = (number_text(number, row.scale) for number in (row.spread, min(row.scores), max(row.scores)))
    return f"{spread} ({low} to {high})"


def verdict(row: Pooled, name: str, baseline: str) -> str:
    """The result of a comparison in one sentence, with its uncertainty.

    Args:
        row: the comparison on one task or on the average.
        name, baseline: names of the two methods.
    """
    difference, interval = row.difference.value, _interval(row)
    unit = " points" if row.scale == PERCENT else ""
    count = f"{row.documents:,} documents" + (" of unknown independence" if row.unknown else "")
    if row.seeds > 1:
        over = f"over {row.seeds} seeds and {count}"
        over += f" ({'all' if row.agreeing == row.seeds else f'only {row.agreeing} of'} {row.seeds} seeds agree)"
    else:
        over = f"over {count}" + (" (one draw of calibration samples; another can change it)" if row.drawn else "")
    if row.holds:
        size, side = number_text(abs(difference), row.scale), "above" if difference > 0 else "below"
        return f"{name} is {size}{unit} {side} {baseline}{interval} {over}."
    size = number_text(difference, row.scale, signed=True)
    return f"{name} cannot be told apart from {baseline}: {size}{unit}{interval} {over}."


def _interval(row: Pooled) -> str:
    low, high = (number_text(end, row.scale, signed=True) for end in (row.difference.low, row.difference.high))
    return "" if np.isnan(row.difference.error) else f" [{low}, {high}]"
