"""Evaluated configurations of Q-VLM: what all cells of an ablation share, and what came out of each."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.plan_request import PlanRequest, check_request
from qvlm_plugin.report.results import Score, read_results
from qvlm_plugin.report.running import run_cells
from qvlm_plugin.report.runs import Cell, Outcome, Setting
from qvlm_plugin.report.shares import score_text
from qvlm_plugin.report.writing import STAND_IN


@dataclass(frozen=True)
class Subject:
    """What all cells of an ablation share.

    Attributes:
        pretrained, calibration: as ``--model_args`` names them.
        tasks: names of lmms-eval's tasks.
        limit: documents of each task; None evaluates all.
        options: of ``method=qvlm``, as text.
        model_args: further model arguments.
    """

    pretrained: str
    calibration: str
    tasks: tuple[str, ...]
    limit: int | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    model_args: Mapping[str, str] = field(default_factory=dict)

    def request(self, scheme: str, **options: str) -> PlanRequest:
        """The checked request for ``method=qvlm`` with further options."""
        return check_request("qvlm", scheme, {**self.options, **options})

    def cell(self, name: str, scheme: str, **options: str) -> Cell:
        """A run of ``method=qvlm``. It names only options that differ from their defaults, so that equal runs agree."""
        changed = self.request(scheme, **options).options.model_dump(mode="json", exclude_defaults=True)
        arguments = {"method": "qvlm", "scheme": scheme, "calibration": self.calibration}
        return self._cell(name, arguments | {option: str(value).lower() for option, value in changed.items()})

    def full_precision(self) -> Cell:
        """The run that all others are measured against."""
        return self._cell("full-precision", {"method": "none", "scheme": "w16a16"})

    def _cell(self, name: str, arguments: Mapping[str, str]) -> Cell:
        model_args = {"pretrained": self.pretrained, **arguments, **self.model_args}
        return Cell(name, model_args, self.tasks, self.limit)


@dataclass(frozen=True)
class Evaluated:
    """A cell and its scores; none when it failed."""

    outcome: Outcome

    @cached_property
    def scores(self) -> dict[str, Score]:
        """By task and metric."""
        found = read_results([self.outcome.results]) if self.outcome.results else []
        return {f"{score.task} {score.metric}": score for score in found}

    @property
    def run(self) -> Mapping[str, Any]:
        """The run's provenance."""
        return next((score.run or {} for score in self.scores.values()), {})

    @property
    def search_seconds(self) -> float | None:
        """How long the search of its plan took; None when it failed or searched nothing."""
        return self.run.get("search_seconds") if self.run.get("calibration") else None

    def row(self) -> dict[str, Any]:
        """As JSON data."""
        return {
            "model_args": dict(self.outcome.cell.model_args),
            "results": str(self.outcome.results) if self.outcome.results else None,
            "search_seconds": self.search_seconds,
            "stand_in": self.run.get("stand_in"),
            "scores": [
                {
                    "task": score.task,
                    "metric": score.metric,
                    "value": score.value,
                    "stderr": score.stderr,
                    "documents": score.documents,
                    "limited": score.limited,
                }
                for score in self.scores.values()
            ],
        }

    def texts(self, columns: Sequence[str]) -> list[str]:
        """Its part of a table's row: search cost and accuracies."""
        if not self.scores:
            return ["", *("failed" for _ in columns)]
        cost = "" if self.search_seconds is None else f"{self.search_seconds:.1f}"
        return [cost, *(_accuracy_text(self.scores.get(column)) for column in columns)]


def evaluate(cells: Sequence[Cell], setting: Setting) -> list[Evaluated]:
    """Run the cells that are not finished yet.

    Raises:
        QVLMError: one failed, unless the setting says to keep going; or not a single one finished.
    """
    evaluated = [Evaluated(outcome) for outcome in run_cells(cells, setting)]
    if not any(one.scores for one in evaluated):
        raise QVLMError(f"none of the {len(cells)} runs finished: {evaluated[0].outcome.failure}")
    return evaluated


def failures(evaluated: Collection[Evaluated]) -> list[Path]:
    """Logs of the cells that failed."""
    return [one.outcome.log for one in evaluated if not one.scores]


def columns_of(evaluated: Collection[Evaluated]) -> list[str]:
    """Tasks with their metrics, for the columns of a table."""
    return sorted({column for one in evaluated for column in one.scores})


def notes_on(evaluated: Collection[Evaluated]) -> list[str]:
    """Stand-in data, documents per task, limits and failures."""
    notes = []
    if any(one.run.get("stand_in") for one in evaluated):
        notes.append(STAND_IN)
    scores = [score for one in evaluated for score in one.scores.values()]
    counts = {score.task: score.documents for score in scores if score.documents is not None}
    limited = ", limited" if any(score.limited for score in scores) else ""
    notes.append("Documents: " + ", ".join(f"{task} {count}" for task, count in sorted(counts.items())) + limited + ".")
    if failed := failures(evaluated):
        notes.append(f"{len(failed)} of {len(evaluated)} runs failed.")
    return notes


def accuracy(score: Score | None) -> tuple[float, float | None] | None:
    """Value and standard error for a figure, of shares in percent."""
    if score is None:
        return None
    return score.scale * score.value, None if score.stderr is None else score.scale * score.stderr


def _accuracy_text(score: Score | None) -> str:
    return "" if score is None else score_text(score.value, score.stderr, score.scale)
