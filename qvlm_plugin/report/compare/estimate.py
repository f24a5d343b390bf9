"""How long the runs of a grid will take, by those that are finished."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.reading import read_json
from qvlm_plugin.report.leaderboard.schema import ResultsFile, parse_results
from qvlm_plugin.report.runs import Cell

EXACT, ALIKE, ANY = "runs of the same method and scheme", "runs of other methods", "runs in another precision"
"""What the time of a run can rest on, the best first; each on the same model and task."""


@dataclass(frozen=True)
class Finished:
    """A run that is finished.

    Attributes:
        arguments: of the model, by name.
        tasks: what was evaluated.
        documents, total: how many were evaluated, and how many the tasks have.
        evaluation: seconds, the search left out.
        search: seconds that finding the plan took, in this run or before; None where nothing was searched.
    """

    arguments: Mapping[str, str]
    tasks: frozenset[str]
    documents: int
    total: int
    evaluation: float
    search: float | None


@dataclass(frozen=True)
class Estimate:
    """What a run takes.

    Attributes:
        evaluation: seconds; None where no run on the same model and task is finished.
        basis: what that rests on; empty where it is None.
        search: seconds that finding its plan takes; None where no finished run tells, 0 where there is nothing to find.
    """

    evaluation: float | None
    basis: str
    search: float | None


def finished_runs(output: Path) -> list[Finished]:
    """The runs below a folder that tell how long they took."""
    found = []
    for file in sorted(output.rglob("*_results.json")):
        try:
            content = read_json(file)
            found.append(_finished(parse_results(content, file), content.get("total_evaluation_time_seconds")))
        except (OSError, ValueError, KeyError, TypeError, QVLMError):
            continue  # what is wrong with it is said where it is compared
    return found


def _finished(parsed: ResultsFile, took: str) -> Finished:
    """Raises ValueError, KeyError or TypeError where something is not told."""
    seconds, provenance = float(took), parsed.qvlm
    if provenance is None or not isinstance(parsed.config.model_args, str) or not 0 < seconds < math.inf:
        raise ValueError("it does not tell how long it took")
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
    """What a run takes, by the finished ones that are most like it.

    Args:
        cell: the run.
        searched: whether it searches a plan, that is, is the first of its plan.
        finished: see `finished_runs`.
    """
    same_model = [one for one in finished if one.arguments.get("pretrained") == cell.model_args["pretrained"]]
    own = _without(cell.model_args, "seed")
    plan = _without(cell.model_args, "seed", "backend")
    alike = [one for one in same_model if _without(one.arguments, "seed", "backend") == plan]
    known = [one.search for one in alike if one.search is not None]
    search = 0.0 if not searched else _mean(known)
    ranked: dict[str, list[Finished]] = {EXACT: [], ALIKE: [], ANY: []}
    for one in same_model:
        if one.tasks == set(cell.tasks) and one.documents:
            quantized = [arguments.get("method", "none") != "none" for arguments in (one.arguments, own)]
            other = ALIKE if quantized[0] == quantized[1] else ANY
            ranked[EXACT if _without(one.arguments, "seed") == own else other].append(one)
    for basis, runs in ranked.items():
        if runs:
            total = max(one.total for one in runs)
            documents = total if cell.limit is None else min(cell.limit, total)
            return Estimate(documents * _mean([one.evaluation / one.documents for one in runs]), basis, search)
    return Estimate(None, "", search)


def _without(arguments: Mapping[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in arguments.items() if name not in names}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
