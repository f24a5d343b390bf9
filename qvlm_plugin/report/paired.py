"""Compare runs over the same documents: paired differences, with standard errors clustered by image."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.report.estimates import (
    Estimate,
    cluster_sums,
    clustered_mean,
    difference_estimate,
    score_estimate,
    without_error,
)
from qvlm_plugin.report.samples import Document, RunSamples, check_same_documents
from qvlm_plugin.report.shares import PERCENT, scale
from qvlm_plugin.report.significance import sign_flip_p

AVERAGE = "average"
"""Name of the row that averages all tasks."""


@dataclass(frozen=True)
class Flips:
    """Numbers of documents that differ between two runs.

    Attributes:
        broke, fixed: documents that score lower and higher than in the baseline; for scores of 0 and 1 these are
            right→wrong and wrong→right.
        changed: documents with a different answer, whatever it scores.
    """

    broke: int
    fixed: int
    changed: int


@dataclass(frozen=True)
class Comparison:
    """One run compared with the baseline on one task, or on the average of all tasks.

    Attributes:
        run: the run compared.
        task: the task's name, or `AVERAGE`.
        documents, clusters: their numbers; there are fewer clusters than documents if some share an image.
        unknown: number of documents whose image no run records. Each counts as a cluster of its own, so errors and p
            are too small if some of them share an image.
        scale: factor by which tables multiply scores and differences: `shares.scale`.
        baseline, score: the two runs' means.
        difference: score minus baseline.
        p: p of the null hypothesis that the two runs' answers are interchangeable; see `sign_flip_p`.
        flips: numbers of changed documents.
        total: whether the task computes its score from all documents at once, as MME does. The score then has no
            standard error, and p and flips use the documents' own scores.
    """

    run: RunSamples
    task: str
    documents: int
    clusters: int
    unknown: int
    scale: int
    baseline: Estimate
    score: Estimate
    difference: Estimate
    p: float
    flips: Flips
    total: bool = False


@dataclass(frozen=True)
class PairedTask:
    """A task's n documents in several pairs of runs.

    Attributes:
        baseline, score: their scores in the two runs of each pair, float64[pairs, n].
        clusters: each document's cluster, int[n]; numbers identify clusters across tasks.
        changed: number of documents with different answers, summed over the pairs.
        unknown: number of documents whose image no run records.
        scale: factor by which tables multiply scores: `shares.scale`.
        totals: baseline and score of each pair if they are not means of the documents' scores, float64[2, pairs].
    """

    baseline: np.ndarray
    score: np.ndarray
    clusters: np.ndarray
    changed: int
    unknown: int
    scale: int
    totals: np.ndarray | None = None

    @property
    def means(self) -> np.ndarray:
        """Baseline and score of each pair, float64[2, pairs]."""
        return np.stack([self.baseline.mean(axis=1), self.score.mean(axis=1)]) if self.totals is None else self.totals

    @property
    def differences(self) -> np.ndarray:
        """Score minus baseline, float64[pairs, n]."""
        return self.score - self.baseline


def compare(baseline: RunSamples, other: RunSamples, metric: str) -> list[Comparison]:
    """Compare a run with the baseline on each task that has the metric and, if there are several, on their average.

    Documents with the same image form one cluster, across tasks too. A document without an image is a cluster of its
    own, and so is one whose image no run records (`Comparison.unknown`).

    Raises:
        QVLMError: the runs do not cover the same documents, or the metric is missing.
    """
    tasks = paired_tasks([(baseline, other)], metric)
    rows = [_comparison(other, task, [own]) for task, own in tasks.items()]
    return rows if len(rows) == 1 else [*rows, _comparison(other, AVERAGE, [*tasks.values()])]


def paired_tasks(pairs: Sequence[tuple[RunSamples, RunSamples]], metric: str) -> dict[str, PairedTask]:
    """The documents of each task that has the metric, in one or more pairs of a baseline and another run.

    Raises:
        QVLMError: the runs do not cover the same documents, or the metric is missing.
    """
    runs = [run for pair in pairs for run in pair]
    for run in runs[1:]:
        check_same_documents(runs[0], run)
    found = {task: _with_metric(runs, task, metric) for task in runs[0].tasks}
    found = {task: rows for task, rows in found.items() if rows}
    if not found:
        if any(metric in each.records for documents in runs[0].tasks.values() for each in documents):
            raise QVLMError(f"{runs[0].file} logs {metric} without a score for each document, so it cannot be paired")
        allowed = ", ".join(runs[0].metrics) or "-"
        raise QVLMError(f"{runs[0].file} has no samples with metric {metric!r}; allowed are {allowed}")
    keys = [_image(row) or f"{task} {row[0].id}" for task, rows in found.items() for row in rows]
    _, labels = np.unique(keys, return_inverse=True)
    clusters = np.split(labels, np.cumsum([len(rows) for rows in found.values()])[:-1])
    tasks = {task: _paired_task(rows, metric, own) for (task, rows), own in zip(found.items(), clusters, strict=True)}
    return {
        task: _with_totals(one, [run.totals.get((task, metric)) for run in runs], metric) for task, one in tasks.items()
    }


def _with_metric(runs: Sequence[RunSamples], task: str, metric: str) -> list[tuple[Document, ...]]:
    """A task's documents that have the metric, each with its entry in every run."""
    found = []
    for row in zip(*(sorted(run.tasks[task], key=lambda document: document.id) for run in runs), strict=True):
        having = [metric in document.metrics for document in row]
        if any(having) and not all(having):
            run = runs[having.index(False)]
            raise QVLMError(f"{run.file} has no {metric} for document {row[0].id} of task {task}")
        if all(having):
            found.append(row)
    return found


def _image(row: Sequence[Document]) -> str | None:
    """A document's image from the first run that records it: empty if it has none, None if no run records it."""
    return next((document.image for document in row if document.image is not None), None)


def _paired_task(rows: Sequence[tuple[Document, ...]], metric: str, clusters: np.ndarray) -> PairedTask:
    scores = np.array([[document.metrics[metric] for document in row] for row in rows]).T
    answers = np.array([[document.answer for document in row] for row in rows], dtype=object).T
    changed, unknown = int((answers[0::2] != answers[1::2]).sum()), sum(_image(row) is None for row in rows)
    shown = scale(metric, scores.min(), scores.max())
    return PairedTask(scores[0::2], scores[1::2], clusters, changed, unknown, shown)


def _with_totals(task: PairedTask, totals: Sequence[float | None], metric: str) -> PairedTask:
    """Adds the runs' scores if any of them is not the mean of the documents' scores.

    Args:
        totals: each run's score, pair by pair; None if it is the mean.
    """
    if all(total is None for total in totals):
        return task
    rows = [mean if total is None else total for total, mean in zip(totals, task.means.T.ravel(), strict=True)]
    return replace(task, totals=np.array(rows).reshape(-1, 2).T, scale=scale(metric, *rows))


def count_flips(tasks: Sequence[PairedTask]) -> Flips:
    """Numbers of changed documents, summed over tasks and pairs of runs."""
    return Flips(
        broke=sum(int((task.differences < 0).sum()) for task in tasks),
        fixed=sum(int((task.differences > 0).sum()) for task in tasks),
        changed=sum(task.changed for task in tasks),
    )


def _comparison(run: RunSamples, name: str, tasks: Sequence[PairedTask]) -> Comparison:
    """The comparison over tasks that have one pair of runs each."""
    clusters = [task.clusters for task in tasks]
    baselines, scores, differences = zip(*((t.baseline[0], t.score[0], t.differences[0]) for t in tasks), strict=True)
    baseline, score, difference = (clustered_mean(values, clusters) for values in (baselines, scores, differences))
    if total := any(task.totals is not None for task in tasks):
        baseline, score, difference = (without_error(float(means[0])) for means in total_means(tasks))
    elif min(task.scale for task in tasks) == PERCENT:
        baseline, score = (
            score_estimate(estimate, values, clusters) for estimate, values in ((baseline, baselines), (score, scores))
        )
        difference = difference_estimate(difference, clusters)
    return Comparison(
        run=run,
        task=name,
        documents=sum(map(len, clusters)),
        clusters=len(np.unique(np.concatenate(clusters))),
        unknown=sum(task.unknown for task in tasks),
        scale=min(task.scale for task in tasks),
        baseline=baseline,
        score=score,
        difference=difference,
        p=sign_flip_p(cluster_sums(differences, clusters)),
        flips=count_flips(tasks),
        total=total,
    )


def total_means(tasks: Sequence[PairedTask]) -> np.ndarray:
    """Mean over tasks of baseline, score and difference for each pair: float64[3, pairs]."""
    baseline, score = np.mean([task.means for task in tasks], axis=0)
    return np.stack([baseline, score, score - baseline])
