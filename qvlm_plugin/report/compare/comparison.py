"""Every cell of a grid against full precision on the same documents: scores, differences, tests, flips, costs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scipy import stats

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.reading import read_json
from qvlm_plugin.report.compare.grid import FULL_PRECISION
from qvlm_plugin.report.leaderboard.schema import ResultsFile, parse_results
from qvlm_plugin.report.paired import Comparison, Estimate, compare, holm
from qvlm_plugin.report.runs import Outcome
from qvlm_plugin.report.samples import RunSamples, read_samples

MCNEMAR = "McNemar"
SIGN_FLIP = "sign flip"
T = "paired t"


@dataclass(frozen=True)
class Compared:
    """One cell.

    Attributes:
        outcome: its run.
        parsed: its results.
        score: the metric's mean.
        comparison: with full precision; None for full precision itself.
        test: name of the test that ``p`` is from.
        p, adjusted: of no difference, and with Holm's adjustment over the grid; None for full precision.
    """

    outcome: Outcome
    parsed: ResultsFile
    score: Estimate
    comparison: Comparison | None = None
    test: str = ""
    p: float | None = None
    adjusted: float | None = None

    @property
    def arguments(self) -> dict[str, str]:
        """The cell's model arguments."""
        return dict(self.outcome.cell.model_args)

    @property
    def task(self) -> str:
        """The cell's only task."""
        return self.outcome.cell.tasks[0]

    @property
    def tokens_per_second(self) -> float | None:
        """Generated tokens by the time that generating them took."""
        speed = (self.parsed.throughput or {}).get("avg_speed")
        return speed if isinstance(speed, int | float) and speed > 0 else None

    def row(self) -> dict[str, Any]:
        """As JSON data."""
        compared, facts = self.comparison, self.parsed.qvlm
        return {
            "model": self.arguments["pretrained"],
            "method": self.arguments["method"],
            "scheme": self.arguments["scheme"],
            "task": self.task,
            **_numbers("score", self.score),
            **(_numbers("drop", compared.difference) if compared else {}),
            "test": self.test or None,
            "p": self.p,
            "p_holm": self.adjusted,
            "documents": compared.documents if compared else None,
            "clusters": compared.clusters if compared else None,
            "right_to_wrong": compared.flips.fell if compared else None,
            "wrong_to_right": compared.flips.rose if compared else None,
            "changed": compared.flips.changed if compared else None,
            "bits": facts.bits if facts else None,
            "weight_bytes": facts.weight_bytes if facts else None,
            "peak_memory_bytes": facts.peak_memory_bytes if facts else None,
            "tokens_per_second": self.tokens_per_second,
            "search_seconds": facts.search_seconds if facts and facts.calibration else None,
            "plan_hash": facts.plan_hash if facts else None,
            "results": str(self.outcome.results),
        }


def compare_outcomes(outcomes: Sequence[Outcome], metric: str) -> tuple[list[Compared], list[str]]:
    """Compare finished cells with full precision, model by model and task by task.

    Args:
        outcomes: of all cells, each with one task.
        metric: of the tasks.

    Returns:
        The cells that could be read, and a line for each that could not.
    """
    compared, trouble = [], []
    for model, task in dict.fromkeys((one.cell.model_args["pretrained"], one.cell.tasks[0]) for one in outcomes):
        own = [one for one in outcomes if (one.cell.model_args["pretrained"], one.cell.tasks[0]) == (model, task)]
        trouble += [f"{one.cell.name}: the run failed, see {one.log}" for one in own if one.results is None]
        try:
            compared += _compare_task([one for one in own if one.results is not None], metric, trouble)
        except QVLMError as error:
            trouble.append(f"{model}, {task}: {error}")
    tested = [one for one in compared if one.p is not None]
    adjusted = dict(zip(map(id, tested), holm([one.p for one in tested]), strict=True)) if tested else {}
    return [replace(one, adjusted=adjusted.get(id(one))) for one in compared], trouble


def _compare_task(outcomes: Sequence[Outcome], metric: str, trouble: list[str]) -> list[Compared]:
    baselines = [one for one in outcomes if _is_full_precision(one)]
    if not baselines:
        names = ", ".join(one.cell.name for one in outcomes)
        if outcomes:
            raise QVLMError(f"no run in full precision to compare with; left out: {names}")
        return []
    first = _samples(baselines[0])
    results = {id(one): _parsed(one.results) for one in outcomes}
    fingerprint = _fingerprint(results[id(baselines[0])])
    found = []
    for outcome in outcomes:
        try:
            if _fingerprint(results[id(outcome)]) != fingerprint:
                raise QVLMError(f"{outcome.results} is of another checkpoint than {baselines[0].results}")
            if outcome is baselines[0]:
                (row,) = compare(first, first, metric)
                found.append(Compared(outcome, results[id(outcome)], row.score))
                continue
            other = _samples(outcome)
            (row,) = compare(first, other, metric)
            test, p = choose_test(row, first, other, metric)
            found.append(Compared(outcome, results[id(outcome)], row.score, row, test, p))
        except QVLMError as error:
            trouble.append(f"{outcome.cell.name}: {error}")
    return found


def choose_test(row: Comparison, baseline: RunSamples, other: RunSamples, metric: str) -> tuple[str, float]:
    """The test that fits the scores, and its two-sided p.

    Of scores 0 and 1 McNemar's exact test, or where documents share images its extension to clusters, the sign-flip
    test; of soft scores Student's paired t with the clustered standard error.
    """
    documents = (document for run in (baseline, other) for found in run.tasks.values() for document in found)
    if all(document.metrics.get(metric) in (0, 1, None) for document in documents):
        return (MCNEMAR if row.clusters == row.documents else SIGN_FLIP), row.p
    if row.difference.value == 0:
        return T, 1.0
    if not row.difference.error > 0:  # fewer than two clusters, or the same difference everywhere
        return SIGN_FLIP, row.p
    return T, float(2 * stats.t.sf(abs(row.difference.value) / row.difference.error, row.clusters - 1))


def _samples(outcome: Outcome) -> RunSamples:
    (run,) = read_samples(outcome.results)
    return run


def _parsed(file: Path) -> ResultsFile:
    return parse_results(read_json(file), file)


def _fingerprint(parsed: ResultsFile) -> str | None:
    return parsed.qvlm.model_fingerprint if parsed.qvlm else None


def _is_full_precision(outcome: Outcome) -> bool:
    arguments = outcome.cell.model_args
    return (arguments["method"], arguments["scheme"]) == FULL_PRECISION


def _numbers(name: str, estimate: Estimate) -> dict[str, float | None]:
    values = {name: estimate.value, f"{name}_stderr": estimate.error}
    values |= {f"{name}_low": estimate.low, f"{name}_high": estimate.high}
    return {key: value if math.isfinite(value) else None for key, value in values.items()}
