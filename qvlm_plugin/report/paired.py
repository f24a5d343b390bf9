"""Compare runs over the same documents: paired differences, with standard errors clustered by image."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy import special

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.report.naming import labels
from qvlm_plugin.report.results import Grid
from qvlm_plugin.report.samples import Document, RunSamples, check_same_documents
from qvlm_plugin.report.shares import FEWEST, PERCENT, number_text, scale, score_text, unit_text, wilson

AVERAGE = "average"

_SUPPORT = 2_000_000
_DRAWS = 99_999


@dataclass(frozen=True)
class Estimate:
    """A mean, and what its clusters tell about its accuracy.

    Attributes:
        value: the mean.
        error: its standard error; NaN where a task has fewer than two clusters.
        low, high: the 95 % interval, by Student's t with one degree of freedom fewer than there are clusters. It is
            a large-sample interval: too narrow where only a handful of documents differ.
        wilson: whether the interval is Wilson's, and the error says little.
    """

    value: float
    error: float
    low: float
    high: float
    wilson: bool = False


@dataclass(frozen=True)
class Flips:
    """How many documents one run changed.

    Attributes:
        broke, fixed: documents that score lower and higher than in the baseline; for scores of 0 and 1 these are
            right→wrong and wrong→right.
        changed: documents with another answer, whatever its score.
    """

    broke: int
    fixed: int
    changed: int


@dataclass(frozen=True)
class Comparison:
    """One run against the baseline on one task, or on the average of all tasks.

    Attributes:
        run: the run compared.
        task: the task's name, or `AVERAGE`.
        documents, clusters: how many there are; fewer clusters than documents means that some share an image.
        unknown: of how many documents no run tells the image: each is taken for a cluster of its own, so that errors
            and p are too small where some share an image after all.
        scale: by which tables show scores and differences: `shares.scale`.
        baseline, score: both runs' means.
        difference: score minus baseline.
        p: of the null hypothesis that the two runs' answers are interchangeable; see `sign_flip_p`.
        flips: counts of changed documents.
        total: whether a task makes the score of all documents at once, as MME's: it then has no error, and p and flips
            are by the documents' own scores.
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
        baseline, score: their scores in either run of each pair, float64[pairs, n].
        clusters: of which cluster each is, int[n]; the same number is the same cluster in any task.
        changed: documents with another answer, summed over the pairs.
        unknown: documents whose image no run tells.
        scale: by which tables show the scores: `shares.scale`.
        totals: baseline and score of each pair where they are no means of documents' scores, float64[2, pairs].
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

    Documents with the same image form one cluster, across tasks too; one without an image is a cluster of its own, and
    so is one whose image no run tells (`Comparison.unknown`).

    Raises:
        QVLMError: the runs do not cover the same documents, or the metric is missing.
    """
    tasks = paired_tasks([(baseline, other)], metric)
    rows = [_comparison(other, task, [own]) for task, own in tasks.items()]
    return rows if len(rows) == 1 else [*rows, _comparison(other, AVERAGE, [*tasks.values()])]


def paired_tasks(pairs: Sequence[tuple[RunSamples, RunSamples]], metric: str) -> dict[str, PairedTask]:
    """The documents of each task that has the metric, in pairs of a baseline and another run; at least one pair.

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
            raise QVLMError(f"{runs[0].file} logs {metric} of documents as records without a score: nothing to pair")
        known = sorted({name for documents in runs[0].tasks.values() for each in documents for name in each.metrics})
        raise QVLMError(f"{runs[0].file} has no samples with metric {metric!r}; allowed are {', '.join(known) or '-'}")
    keys = [_image(row) or f"{task} {row[0].id}" for task, rows in found.items() for row in rows]
    _, labels = np.unique(keys, return_inverse=True)
    clusters = np.split(labels, np.cumsum([len(rows) for rows in found.values()])[:-1])
    tasks = {task: _paired_task(rows, metric, own) for (task, rows), own in zip(found.items(), clusters, strict=True)}
    return {
        task: _with_totals(one, [run.totals.get((task, metric)) for run in runs], metric) for task, one in tasks.items()
    }


def _with_metric(runs: Sequence[RunSamples], task: str, metric: str) -> list[tuple[Document, ...]]:
    """A task's documents that have the metric; each as it is in all runs."""
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
    """A document's image, as the first run that tells it does: empty where it has none, None where no run tells."""
    return next((document.image for document in row if document.image is not None), None)


def _paired_task(rows: Sequence[tuple[Document, ...]], metric: str, clusters: np.ndarray) -> PairedTask:
    scores = np.array([[document.metrics[metric] for document in row] for row in rows]).T
    answers = np.array([[document.answer for document in row] for row in rows], dtype=object).T
    changed, unknown = int((answers[0::2] != answers[1::2]).sum()), sum(_image(row) is None for row in rows)
    shown = scale(metric, scores.min(), scores.max())
    return PairedTask(scores[0::2], scores[1::2], clusters, changed, unknown, shown)


def _with_totals(task: PairedTask, totals: Sequence[float | None], metric: str) -> PairedTask:
    """The task with the runs' scores, in pairs, where any is no mean; of a run where it happens to be one, the mean."""
    if all(total is None for total in totals):
        return task
    rows = [mean if total is None else total for total, mean in zip(totals, task.means.T.ravel(), strict=True)]
    return replace(task, totals=np.array(rows).reshape(-1, 2).T, scale=scale(metric, *rows))


def count_flips(tasks: Sequence[PairedTask]) -> Flips:
    """The changed documents, summed over tasks and pairs of runs."""
    return Flips(
        broke=sum(int((task.differences < 0).sum()) for task in tasks),
        fixed=sum(int((task.differences > 0).sum()) for task in tasks),
        changed=sum(task.changed for task in tasks),
    )


def _comparison(run: RunSamples, name: str, tasks: Sequence[PairedTask]) -> Comparison:
    """Of tasks with one pair."""
    clusters = [task.clusters for task in tasks]
    baselines, scores, differences = zip(*((t.baseline[0], t.score[0], t.differences[0]) for t in tasks), strict=True)
    baseline, score, difference = (clustered_mean(values, clusters) for values in (baselines, scores, differences))
    if total := any(task.totals is not None for task in tasks):
        baseline, score, difference = (without_error(float(one[0])) for one in total_means(tasks))
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
    """Baseline, score and their difference, each the mean over tasks, by pair: float64[3, pairs]."""
    baseline, score = np.mean([task.means for task in tasks], axis=0)
    return np.stack([baseline, score, score - baseline])


def without_error(value: float) -> Estimate:
    """A score of whose accuracy nothing is known."""
    return Estimate(value, np.nan, np.nan, np.nan)


def clustered_mean(values: Sequence[np.ndarray], clusters: Sequence[np.ndarray]) -> Estimate:
    """Mean over tasks of the tasks' means, each task with the same weight, with a standard error clustered by image.

    The variance is the sum over clusters of their squared summed deviations from the tasks' means, each task scaled by
    G/(G - 1) for its G clusters (Liang and Zeger 1986). For one task of independent documents it is s²/n.

    Args:
        values: of each task the documents' values, float64[n].
        clusters: of each task the documents' clusters, int[n]; a cluster may reach over several tasks.
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
    """A mean of scores from 0 to 1, with Wilson's interval where fewer than `FEWEST` of them differ from 0, or from 1.

    For scores between 0 and 1 the interval is wider than it need be.

    Args:
        estimate: by `clustered_mean`.
        values, clusters: as there.
    """
    every = np.concatenate(values)
    if every.min() < 0 or every.max() > 1 or min((every > 0).sum(), (every < 1).sum()) >= FEWEST:
        return estimate
    low, high = wilson(estimate.value, _effective_count(clusters))
    return replace(estimate, low=low, high=high, wilson=True)


def difference_estimate(estimate: Estimate, clusters: Sequence[np.ndarray]) -> Estimate:
    """A mean of differences of scores from 0 to 1, with an interval where all are the same, so that no error is seen.

    Where scores are 0 and 1 it is Tango's score interval (1998); of no difference it reaches as far as Wilson's of 0.

    Args:
        estimate: by `clustered_mean`.
        clusters: as there.
    """
    if estimate.error != 0 or abs(estimate.value) not in (0, 1):
        return estimate
    _, reach = wilson(0, _effective_count(clusters))
    reach *= 1 + abs(estimate.value)
    return replace(estimate, low=max(-1.0, estimate.value - reach), high=min(1.0, estimate.value + reach))


def _effective_count(clusters: Sequence[np.ndarray]) -> float:
    """As many independent documents tell a share as surely as these, each task with the same weight."""
    return len(clusters) ** 2 / sum(1 / len(np.unique(task)) for task in clusters)


def cluster_sums(values: Sequence[np.ndarray], clusters: Sequence[np.ndarray]) -> np.ndarray:
    """What each cluster contributes to the mean of the tasks' means, float64[clusters]."""
    weighted = np.concatenate([task / (len(task) * len(values)) for task in values])
    _, labels = np.unique(np.concatenate(clusters), return_inverse=True)
    return np.bincount(labels, weights=weighted)


def sign_flip_p(sums: np.ndarray, seed: int = 0) -> float:
    """Two-sided p of Fisher's paired randomization test: every cluster's difference could as well have the other sign.

    Clusters with differences of the same size share a binomial distribution, so the distribution of the total is that
    of a few scaled binomials. It is computed exactly while it has few enough values, and drawn from otherwise. For
    scores of 0 and 1 and independent documents this is McNemar's exact test.

    Args:
        sums: the clusters' summed differences, float64[clusters].
        seed: of the draws.

    Returns:
        The probability of a total at least as far from 0; from draws it is at least 1/100,000.
    """
    sums = sums[np.abs(sums) > 1e-12]  # rounding leaves traces where a cluster's differences cancel
    if not len(sums):
        return 1.0
    sums = sums / np.abs(sums).max()
    _, first, counts = np.unique(np.abs(sums).round(9), return_index=True, return_counts=True)
    sizes = np.abs(sums)[first]
    observed = abs(sums.sum()) - 1e-8  # equal totals differ by rounding
    support, mass = np.zeros(1), np.ones(1)
    for size, count in zip(sizes, counts, strict=True):
        if len(support) * (count + 1) > _SUPPORT:
            return _drawn_p(sizes, counts, observed, seed)
        positive = np.arange(count + 1)
        support = np.add.outer(support, size * (2 * positive - count)).ravel()
        mass = np.multiply.outer(mass, _fair_binomial(count)).ravel()
        _, first, where = np.unique(support.round(9), return_index=True, return_inverse=True)
        support, mass = support[first], np.bincount(where, weights=mass)
    return min(1.0, float(mass[np.abs(support) >= observed].sum()))


def _fair_binomial(count: int) -> np.ndarray:
    """Probabilities of 0 … ``count`` heads among ``count`` tosses of a fair coin, float64[count + 1]."""
    heads = np.arange(count + 1)
    return np.exp(-special.betaln(heads + 1, count - heads + 1) - np.log(count + 1) - count * np.log(2))


def _drawn_p(sizes: np.ndarray, counts: np.ndarray, observed: float, seed: int) -> float:
    generator = np.random.default_rng(seed)
    block = max(1, _SUPPORT // len(sizes))
    extreme = 0
    for start in range(0, _DRAWS, block):
        shape = (min(block, _DRAWS - start), len(sizes))
        totals = (2 * generator.binomial(counts, 0.5, shape) - counts) @ sizes
        extreme += int((np.abs(totals) >= observed).sum())
    return (extreme + 1) / (_DRAWS + 1)


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's adjustment of a family of p values, in their order."""
    order = np.argsort(ps)
    adjusted = np.maximum.accumulate(np.asarray(ps)[order] * np.arange(len(ps), 0, -1)).clip(max=1)
    return adjusted[np.argsort(order)].tolist()


def paired_rows(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """The comparisons as JSON data; Holm's adjustment is over all of them."""
    return [
        {
            "run": row.run.name,
            "file": str(row.run.file),
            "model": (row.run.run or {}).get("pretrained"),
            "backend": (row.run.run or {}).get("backend"),
            "task": row.task,
            "documents": row.documents,
            "clusters": row.clusters,
            "images_unknown": row.unknown,
            **estimate_data("baseline", row.baseline),
            **estimate_data("score", row.score),
            **estimate_data("difference", row.difference),
            "p": row.p,
            "p_holm": adjusted,
            "broke": row.flips.broke,
            "fixed": row.flips.fixed,
            "changed": row.flips.changed,
        }
        for row, adjusted in zip(comparisons, holm([row.p for row in comparisons]), strict=True)
    ]


def estimate_data(name: str, estimate: Estimate) -> dict[str, float | None]:
    """An estimate as JSON data; null where it is not known."""
    values = {name: estimate.value, f"{name}_stderr": estimate.error}
    values |= {f"{name}_low": estimate.low, f"{name}_high": estimate.high}
    return {key: value if np.isfinite(value) else None for key, value in values.items()}


def paired_grid(baseline: RunSamples, comparisons: Sequence[Comparison]) -> Grid:
    """The comparisons as a table, shares in percent; Holm's adjustment is over all its rows."""
    names = _names(baseline, comparisons)
    rows = [
        (
            names[row.run.file],
            row.task,
            estimate_text(row.baseline, row.scale),
            estimate_text(row.score, row.scale),
            difference_text(row.difference, row.scale),
            p_text(row.p, row.unknown),
            p_text(adjusted, row.unknown),
            flips_text(row.flips),
        )
        for row, adjusted in zip(comparisons, holm([row.p for row in comparisons]), strict=True)
    ]
    header = ("run", "task", "baseline", "score", "difference", "p", "p (Holm)", "broke / fixed / changed")
    return Grid(header, tuple(rows), lead=2)


def _names(baseline: RunSamples, comparisons: Sequence[Comparison]) -> dict[Path, str]:
    return labels({run.file: run.run or {} for run in (baseline, *(row.run for row in comparisons))})


def paired_notes(baseline: RunSamples, comparisons: Sequence[Comparison], metric: str) -> list[str]:
    """What the table's figures are, line by line."""
    compared = {row.task: row for row in comparisons if row.task != AVERAGE}
    unit = unit_text(min(row.scale for row in comparisons))
    lines = [
        f"baseline: {_names(baseline, comparisons)[baseline.file]}, {baseline.file}",
        f"{metric} {unit} ± standard error, or with Wilson's 95 % interval where fewer than {FEWEST} documents are "
        "right, or wrong",
        "difference: run minus baseline, of shares in points, with its 95 % interval; average: every task weighs the "
        "same",
        f"p: sign-flip test (for 0/1 scores of independent documents McNemar's), exact or from {_DRAWS:,} draws (then "
        f"at least {1 / (_DRAWS + 1):.0e}); Holm over all {len(comparisons)} rows",
        "broke, fixed: documents that score lower, higher (right→wrong, wrong→right); changed: other answers",
        *(f"{task}: {_clusters(row)}" for task, row in compared.items()),
        *(total_note(task, metric) for task, row in compared.items() if row.total),
    ]
    if left_out := [task for task in baseline.tasks if task not in compared]:
        lines.append(f"left out, without {metric}: {', '.join(left_out)}")
    if any((run.run or {}).get("stand_in") for run in (baseline, *(row.run for row in comparisons))):
        lines.append("stand-in data")
    return lines


def _clusters(row: Comparison) -> str:
    if row.unknown:
        return unknown_note(row.unknown, row.documents)
    if row.clusters == row.documents:
        return f"{row.documents} documents, taken as independent: no two share an image"
    return f"{row.documents} documents in {row.clusters} clusters of the same image"


def total_note(task: str, metric: str) -> str:
    """What figures of a score mean that a task makes of all documents at once."""
    return (
        f"{task}: {metric} is made of all documents at once, so it has no standard error and no interval; p and flips "
        "are by the documents' own scores"
    )


def unknown_note(unknown: int, documents: int) -> str:
    """What it means that some documents' images are not known."""
    return (
        f"{documents} documents, of {unknown} of which no run tells the image: whether they are independent is "
        "unknown, and where some share an image, errors, intervals and p (marked ?) are too small"
    )


def estimate_text(estimate: Estimate, scale: int) -> str:
    """A score for a table, with its standard error or Wilson's interval where there is one."""
    return score_text(estimate.value, estimate.error, scale, (estimate.low, estimate.high) if estimate.wilson else None)


def difference_text(estimate: Estimate, scale: int, decimals: int = 2) -> str:
    """A difference for a table, of shares in points, with its interval where there is one."""
    ends = [estimate.low, estimate.high]
    ends = [min(max(end, -1.0), 1.0) for end in ends] if scale == PERCENT else ends
    value, low, high = (number_text(one, scale, decimals, signed=True) for one in (estimate.value, *ends))
    return value if np.isnan(estimate.error) else f"{value} [{low}, {high}]"


def flips_text(flips: Flips) -> str:
    """Counts of changed documents for a table."""
    return f"{flips.broke} / {flips.fixed} / {flips.changed}"


def p_text(p: float, unknown: int = 0) -> str:
    """A p value for a table; with a question mark where the images of ``unknown`` documents are not known."""
    return (f"{p:.3f}" if p >= 0.001 else f"{p:.1e}") + ("?" if unknown else "")
