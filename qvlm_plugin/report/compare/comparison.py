"""Compare every cell of a grid with the baseline on the same documents: scores, differences, tests, flips, costs."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scipy import stats

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.report.compare.grid import STORED, CompareGrid, GridCell, cells
from qvlm_plugin.report.estimates import Estimate, estimate_data
from qvlm_plugin.report.leaderboard.schema import ResultsFile, read_results_file
from qvlm_plugin.report.paired import AVERAGE, Comparison, compare
from qvlm_plugin.report.pooled import Pooled, pool
from qvlm_plugin.report.runs import Outcome
from qvlm_plugin.report.samples import RunSamples, read_samples
from qvlm_plugin.report.significance import holm

MCNEMAR = "McNemar"
SIGN_FLIP = "sign flip"
T = "paired t"


@dataclass(frozen=True)
class Compared:
    """One cell with its comparison.

    Attributes:
        grid_cell: the cell of the grid.
        file: its results file.
        parsed, samples: content of the results and samples files.
        score: the metric's mean.
        scale: factor by which tables multiply it: `shares.scale`.
        comparison: comparison with the baseline of the same seed; None for full precision and for the baseline itself.
        test: name of the test that gives ``p``.
        p, adjusted: two-sided p, and p with Holm's adjustment over the grid; None without a comparison.
    """

    grid_cell: GridCell
    file: Path
    parsed: ResultsFile
    samples: RunSamples
    score: Estimate
    scale: int
    comparison: Comparison | None = None
    test: str = ""
    p: float | None = None
    adjusted: float | None = None

    @property
    def scheme(self) -> str:
        """The scheme of the run; for a checkpoint that was already quantized, the one recorded in its results."""
        facts = self.parsed.qvlm
        return facts.scheme if self.grid_cell.scheme == STORED and facts else self.grid_cell.scheme

    def row(self) -> dict[str, Any]:
        """The cell as JSON data."""
        compared, facts = self.comparison, self.parsed.qvlm
        return {
            "model": self.grid_cell.model,
            "method": self.grid_cell.method,
            "scheme": self.scheme,
            "seed": self.grid_cell.seed,
            "task": self.grid_cell.task,
            **estimate_data("score", self.score),
            **(estimate_data("difference", compared.difference) if compared else {}),
            "test": self.test or None,
            "p": self.p,
            "p_holm": self.adjusted,
            "documents": compared.documents if compared else None,
            "clusters": compared.clusters if compared else None,
            "images_unknown": compared.unknown if compared else None,
            "right_to_wrong": compared.flips.broke if compared else None,
            "wrong_to_right": compared.flips.fixed if compared else None,
            "changed": compared.flips.changed if compared else None,
            "bits": facts.bits if facts else None,
            "packed_bytes": facts.packed_bytes if facts else None,
            **(facts.measured_bytes if facts else {"weight_bytes": None, "peak_memory_bytes": None}),
            "tokens_per_second": self.parsed.tokens_per_second,
            "search_seconds": facts.search_seconds if facts and facts.calibration else None,
            "plan_hash": facts.plan_hash if facts else None,
            "results": str(self.file),
        }


@dataclass(frozen=True)
class OverSeeds:
    """One method over its seeds, on one task or on the average of all tasks.

    Attributes:
        model, method, scheme, task: identify the row; the task may be `AVERAGE`.
        baseline: name of the method that it is compared with; None for full precision and for the baseline itself.
        pooled: the figures; without a baseline, its differences are meaningless.
        adjusted: ``pooled.t_p`` with Holm's adjustment over all rows that have a baseline.
    """

    model: str
    method: str
    scheme: str
    task: str
    baseline: str | None
    pooled: Pooled
    adjusted: float | None = None

    def row(self) -> dict[str, Any]:
        """The row as JSON data."""
        pooled = self.pooled
        found = {"model": self.model, "method": self.method, "scheme": self.scheme, "task": self.task}
        found |= {"seeds": pooled.seeds, **estimate_data("score", pooled.score), "scores": [*pooled.scores]}
        found |= {"spread": pooled.spread, "documents": pooled.documents, "clusters": pooled.clusters}
        found |= {"images_unknown": pooled.unknown}
        if self.baseline is None:
            return found | {"baseline": None}
        return found | {
            "baseline": self.baseline,
            **estimate_data("difference", pooled.difference),
            "differences": [*pooled.differences],
            "p_t": pooled.t_p,
            "p_t_holm": self.adjusted,
            "p_sign_flip": pooled.sign_flip_p,
            "seeds_of_same_sign": pooled.agreeing,
            "holds": pooled.holds,
            "right_to_wrong": pooled.flips.broke,
            "wrong_to_right": pooled.flips.fixed,
            "changed": pooled.flips.changed,
        }


Key = tuple[str, str, str, int | None, str]
"""Model, method, scheme, seed and task of a cell."""


def compare_outcomes(grid: CompareGrid, outcomes: Sequence[Outcome]) -> tuple[list[Compared], list[str]]:
    """Compare finished cells with the baseline, each on its task and with its seed.

    Args:
        grid: the grid.
        outcomes: outcomes of all its cells, in their order.

    Returns:
        The cells that could be compared, and a line for each that could not.
    """
    problems: list[str] = []
    read: dict[Key, Compared] = {}
    for grid_cell, outcome in zip(cells(grid), outcomes, strict=True):
        if outcome.results is None:
            problems.append(outcome.failure)
            continue
        try:
            read[_key(grid_cell)] = _read(grid_cell, outcome.results, grid.metric)
        except QVLMError as error:
            problems.append(f"{grid_cell.cell.name}: {error}")
    compared = []
    for cell in read.values():
        try:
            compared.append(_with_baseline(grid, cell, read))
        except QVLMError as error:
            problems.append(f"{cell.grid_cell.cell.name}: {error}")
    tested = [cell.p for cell in compared if cell.p is not None]
    adjusted = iter(holm(tested) if tested else ())
    return [cell if cell.p is None else replace(cell, adjusted=next(adjusted)) for cell in compared], problems


def _key(grid_cell: GridCell) -> Key:
    return grid_cell.model, grid_cell.method, grid_cell.scheme, grid_cell.seed, grid_cell.task


def _read(grid_cell: GridCell, file: Path, metric: str) -> Compared:
    (samples,) = read_samples(file)
    *_, row = compare(samples, samples, metric)
    *_, parsed = read_results_file(file)
    return Compared(grid_cell, file, parsed, samples, row.score, row.scale)


def _with_baseline(grid: CompareGrid, cell: Compared, read: Mapping[Key, Compared]) -> Compared:
    """Adds the comparison with the cell's baseline, if it has one."""
    grid_cell = cell.grid_cell
    if (named := grid.baseline_of(grid_cell.method, grid_cell.scheme)) is None:
        return cell
    draws = grid.draws(*named)
    baseline = read.get(
        (grid_cell.model, *named, grid_cell.seed if grid_cell.seed in draws else draws[0], grid_cell.task)
    )
    if baseline is None:
        raise QVLMError(f"left out: its baseline {' '.join(named)} has no run")
    stored = STORED in (grid_cell.scheme, named[1])  # its row has a checkpoint of its own
    if not stored and _fingerprint(cell.parsed) != _fingerprint(baseline.parsed):
        raise QVLMError(f"{cell.file} and {baseline.file} are of different checkpoints")
    *_, row = compare(baseline.samples, cell.samples, grid.metric)
    test, p = choose_test(row, baseline.samples, cell.samples, grid.metric)
    return replace(cell, comparison=row, test=test, p=p)


def pool_seeds(grid: CompareGrid, compared: Sequence[Compared]) -> list[OverSeeds]:
    """Each method over its seeds: a row for each task and, if the grid has several, one for their average.

    A task is pooled over the seeds for which both the method and its baseline have runs on it; the average over the
    seeds for which they have runs on all tasks.
    """
    samples = {_key(row.grid_cell): row.samples for row in compared}
    schemes = {(row.grid_cell.model, row.grid_cell.method, row.grid_cell.scheme): row.scheme for row in compared}
    found: list[OverSeeds] = []
    for (model, method, scheme), shown in schemes.items():
        own, baseline = (method, scheme), grid.baseline_of(method, scheme)
        for tasks in [(task,) for task in grid.tasks] + ([grid.tasks] if len(grid.tasks) > 1 else []):
            pairs = [
                tuple(_joined([samples.get((model, *run, seed, task)) for task in tasks]) for run, seed in pair)
                for pair in _seed_pairs(grid, baseline or own, own)
            ]
            if whole := [pair for pair in pairs if None not in pair]:
                task = tasks[0] if len(tasks) == 1 else AVERAGE
                *_, average = pool(whole, grid.metric)
                found.append(OverSeeds(model, method, shown, task, baseline and baseline[0], average))
    tested = [row.pooled.t_p for row in found if row.baseline is not None]
    adjusted = iter(holm(tested) if tested else ())
    return [row if row.baseline is None else replace(row, adjusted=next(adjusted)) for row in found]


Run = tuple[tuple[str, str], int | None]
"""Method and scheme, and the seed."""


def _seed_pairs(grid: CompareGrid, baseline: tuple[str, str], own: tuple[str, str]) -> Iterator[tuple[Run, Run]]:
    """The pairs of runs to compare, with the same seed if both have seeds."""
    baselines, runs = grid.draws(*baseline), grid.draws(*own)
    for seed in max(baselines, runs, key=lambda draws: draws != (None,)):
        yield (baseline, seed if seed in baselines else None), (own, seed if seed in runs else None)


def _joined(runs: Sequence[RunSamples | None]) -> RunSamples | None:
    """Merge runs of one method on different tasks; None if one is missing."""
    if None in runs:
        return None
    tasks = {task: documents for run in runs for task, documents in run.tasks.items()}
    return replace(runs[0], tasks=tasks, totals={key: total for run in runs for key, total in run.totals.items()})


def choose_test(row: Comparison, baseline: RunSamples, other: RunSamples, metric: str) -> tuple[str, float]:
    """The test that fits the scores, and its two-sided p.

    For scores of 0 and 1 it is McNemar's exact test or, if documents share images, its extension to clusters, the
    sign-flip test. For soft scores it is Student's paired t with the clustered standard error.
    """
    documents = (document for run in (baseline, other) for found in run.tasks.values() for document in found)
    if all(document.metrics.get(metric) in (0, 1, None) for document in documents):
        return (MCNEMAR if row.clusters == row.documents else SIGN_FLIP), row.p
    if row.difference.value == 0:
        return T, 1.0
    if not row.difference.error > 0:  # fewer than two clusters, or the same difference everywhere
        return SIGN_FLIP, row.p
    return T, float(2 * stats.t.sf(abs(row.difference.value) / row.difference.error, row.clusters - 1))


def _fingerprint(parsed: ResultsFile) -> str | None:
    return parsed.qvlm.model_fingerprint if parsed.qvlm else None
