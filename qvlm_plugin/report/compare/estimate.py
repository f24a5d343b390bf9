"""Estimate how long the runs of a grid will take, from finished runs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.report.leaderboard.schema import SUFFIX, ResultsFile, read_results_file
from qvlm_plugin.report.runs import Cell

EXACT, ALIKE, ANY = "runs of the same method and scheme", "runs of other methods", "runs in another precision"
"""Runs from which another run's time can be estimated, best first; all have the same model and task."""


@dataclass(frozen=True)
class Finished:
    """A finished run.

    Attributes:
        arguments: the model's arguments by name.
        tasks: names of its tasks.
        documents, total: numbers of documents evaluated, and of documents in the tasks.
        evaluation: seconds without the search.
        search: seconds that the search of its plan took, in this run or earlier; None without a search.
    """

    arguments: Mapping[str, str]
    tasks: frozenset[str]
    documents: int
    total: int
    evaluation: float
    search: float | None


@dataclass(frozen=True)
class Estimate:
    """The estimated time of a run.

    Attributes:
        evaluation: seconds; None if no run with the same model and task is finished.
        basis: what the estimate is based on; empty if it is None.
        search: seconds to search its plan; None if unknown, 0 without a search.
    """

    evaluation: float | None
    basis: str
    search: float | None


def finished_runs(output: Path) -> list[Finished]:
    """The runs below a folder that record how long they took."""
    found = []
    for file in sorted(output.rglob(f"*{SUFFIX}")):
        try:
            _, content, parsed = read_results_file(file)
            found.append(_finished(parsed, content.get("total_evaluation_time_seconds")))
        except (ValueError, KeyError, TypeError, QVLMError):
            continue  # the comparison reports what is wrong with the file
    return found


def _finished(parsed: ResultsFile, took: str) -> Finished:
    """Raises ValueError, KeyError or TypeError if something is not recorded."""
    seconds, provenance = float(took), parsed.qvlm
    if provenance is None or not isinstance(parsed.config.model_args, str) or not 0 < seconds < math.inf:
        raise ValueError("it does not record how long it took")
    search = provenance.search_seconds if provenance.calibration else None
    return Finished(
        arguments=dict(pair.partition("=")[::2] for pair in parsed.config.model_args.split(",")),
        tasks=frozenset(parsed.counts),
        documents=sum(counts.effective for counts in parsed.counts.values()),
        total=sum(counts.original for counts in parsed.counts.values()),
        evaluation=seconds - search if search and search < seconds else seconds,
        search=search,
    )


def estimate(cell: Cell, searched: bool, finished: Sequence[Finished]) -> Estimate:
    """Estimate a run's time from the finished runs most similar to it.

    Args:
        cell: the run.
        searched: whether it searches its plan, which the first run of a plan does.
        finished: see `finished_runs`.
    """
    same_model = [run for run in finished if run.arguments.get("pretrained") == cell.model_args["pretrained"]]
    own = _without(cell.model_args, "seed")
    plan = _without(cell.model_args, "seed", "backend")
    alike = [run for run in same_model if _without(run.arguments, "seed", "backend") == plan]
    known = [run.search for run in alike if run.search is not None]
    search = 0.0 if not searched else _mean(known)
    ranked: dict[str, list[Finished]] = {EXACT: [], ALIKE: [], ANY: []}
    for run in same_model:
        if run.tasks == set(cell.tasks) and run.documents:
            quantized = [arguments.get("method", "none") != "none" for arguments in (run.arguments, own)]
            other = ALIKE if quantized[0] == quantized[1] else ANY
            ranked[EXACT if _without(run.arguments, "seed") == own else other].append(run)
    for basis, runs in ranked.items():
        if runs:
            total = max(run.total for run in runs)
            documents = total if cell.limit is None else min(cell.limit, total)
            return Estimate(documents * _mean([run.evaluation / run.documents for run in runs]), basis, search)
    return Estimate(None, "", search)


def _without(arguments: Mapping[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in arguments.items() if name not in names}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
