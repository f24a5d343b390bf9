"""Find the rows that may be ranked against each other, and rank them."""

import hashlib
import json
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from qvlm_plugin.report.leaderboard.documents import Marks
from qvlm_plugin.report.leaderboard.intervals import TaskScores, rank_intervals
from qvlm_plugin.report.leaderboard.reading import STAND_IN, UNRANKED, Board, Problem
from qvlm_plugin.report.leaderboard.row import Row

UNKNOWN = "unknown documents"


@dataclass(frozen=True)
class Evaluation:
    """The documents and protocol of a score.

    Attributes:
        protocol: task, data set, configuration, split, hash of prompt and generation, and numbers of documents.
        data: identity of the data set; None if not recorded.
        samples: digest of the evaluated documents; None without samples.
    """

    protocol: tuple
    data: str | None
    samples: str | None

    @classmethod
    def of(cls, row: Row) -> "Evaluation":
        """The evaluation of a row."""
        named = (row.task, row.dataset, row.dataset_config, row.split, row.protocol)
        return cls((*named, row.documents, row.documents_total), row.data, row.samples_digest)

    @property
    def is_known(self) -> bool:
        """Whether the documents are identified by the data set or by samples."""
        return self.data is not None or self.samples is not None

    @property
    def name(self) -> str:
        """A short hash."""
        content = json.dumps([self.protocol, self.data, self.samples])
        return hashlib.sha256(content.encode()).hexdigest()[:12]

    def agrees(self, other: "Evaluation") -> bool:
        """Whether protocols are equal, as are data and samples as far as both know them, and both know one of them."""
        pairs = ((self.data, other.data), (self.samples, other.samples))
        known = [pair for pair in pairs if None not in pair]
        return self.protocol == other.protocol and bool(known) and all(one == two for one, two in known)


def rank(board: Board) -> Board:
    """The rows with their evaluations, differences from full precision and ranks, best first within each evaluation.

    Of runs with the same configuration and evaluation, only the newest is kept.
    """
    rows = _mark_stand_ins(with_evaluations(board.rows))
    problems = [*board.problems]
    rows = _without_repeats(rows, problems)
    problems += _version_notes(rows)
    groups: dict[tuple, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.apart, row.task, row.evaluation or "", row.metric].append(row)
    ranked = []
    for key in sorted(groups, key=lambda key: key[:3]):  # metrics stay in the tasks' order
        ranked += _ranked(groups[key], board.marks)
    return replace(board, rows=ranked, problems=problems)


def with_evaluations(rows: Sequence[Row]) -> list[Row]:
    """Rows with their evaluations; a partly unknown evaluation joins the one that agrees with it, if there is one."""
    own = [Evaluation.of(row) for row in rows]
    whole: dict[tuple, set[Evaluation]] = defaultdict(set)
    for evaluation in own:
        if evaluation.data is not None and evaluation.samples is not None:
            whole[evaluation.protocol].add(evaluation)
    named = []
    for row, evaluation in zip(rows, own, strict=True):
        if evaluation.data is None or evaluation.samples is None:
            agreeing = [other for other in whole[evaluation.protocol] if evaluation.agrees(other)]
            evaluation = agreeing[0] if len(agreeing) == 1 else evaluation
        named.append(row.model_copy(update={"evaluation": evaluation.name if evaluation.is_known else None}))
    return named


def _mark_stand_ins(rows: Sequence[Row]) -> list[Row]:
    """Models of other packages do not record stand-in data; rows of the same documents do."""
    known = {row.evaluation for row in rows if STAND_IN in row.notes and row.evaluation}
    return [
        row.model_copy(update={"notes": (STAND_IN, *row.notes), "apart": True})
        if row.evaluation in known and STAND_IN not in row.notes
        else row
        for row in rows
    ]


def _without_repeats(rows: Sequence[Row], problems: list[Problem]) -> list[Row]:
    groups: dict[tuple, list[Row]] = defaultdict(list)
    for row in rows:
        model = (row.model_fingerprint or row.model, row.arguments)
        configuration = (*model, row.plan_hash, row.method, row.scheme, row.options, row.backend, row.dtype, row.device)
        unknown = row.run if row.evaluation is None else None  # rows without an evaluation repeat nothing
        groups[(*configuration, row.evaluation, row.task, row.metric, unknown)].append(row)
    kept = []
    repeats: dict[tuple[str, str], list[str]] = defaultdict(list)
    for group in groups.values():
        *older, newest = sorted(group, key=lambda row: (row.date or "", row.run))
        kept.append(newest)
        for row in older:
            differences = repeats[row.file, newest.file]
            if row.value != newest.value:
                values = f"{row.value:.6g} here and {newest.value:.6g} there"
                differences.append(f"{row.task} {row.metric} is {values}")
    for (file, newest), differences in repeats.items():
        what = f"with another result: {differences[0]}" if differences else "with the same result"
        problems.append(Problem(file, f"repeats {newest}, which is shown instead, {what}"))
    return kept


def _version_notes(rows: Sequence[Row]) -> list[Problem]:
    """Evaluations whose rows were computed by different versions of packages."""
    versions: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for row in rows:
        if row.evaluation and row.versions:
            versions[row.task, row.evaluation].setdefault(row.versions, row.file)
    notes = []
    for (task, _), found in sorted(versions.items()):
        (first, _), *others = found.items()
        for other, file in others:
            differing = sorted(set(other.split(", ")) - set(first.split(", ")))
            notes.append(Problem(file, f"{task}: other versions than in other runs: {', '.join(differing)}"))
    return notes


def _ranked(group: Sequence[Row], marks: Mapping[tuple[str, str], Marks]) -> list[Row]:
    """Rows of one evaluation and metric, best first; unranked rows last."""
    sign = -1 if group[0].higher_is_better else 1
    rankable = [row for row in group if row.evaluation and not UNRANKED & set(row.notes)]
    baselines: dict[str, set[float]] = defaultdict(set)
    for row in rankable:
        if row.method == "none":
            baselines[row.model_fingerprint or row.model].add(row.value)
    intervals = _intervals(rankable, marks)
    rankable_runs = {row.run for row in rankable}
    values = sorted(sign * row.value for row in rankable)
    rows = []
    for row in group:
        update = {}
        if row.run in rankable_runs:
            update |= dict(zip(("rank_low", "rank_high"), intervals.get(row.run, (None, None)), strict=True))
            update["rank"] = 1 + bisect_left(values, sign * row.value)
        elif row.evaluation is None:
            update["notes"] = (*row.notes, UNKNOWN)
        baseline = baselines.get(row.model_fingerprint or row.model, set())
        if row.method not in (None, "none") and len(baseline) == 1:
            update["difference"] = row.value - next(iter(baseline))
        rows.append(row.model_copy(update=update))
    return sorted(rows, key=lambda row: (row.rank is None, sign * row.value, row.model, row.method or ""))


def _intervals(rankable: Sequence[Row], marks: Mapping[tuple[str, str], Marks]) -> dict[str, tuple[int, int]]:
    """Rank intervals by run, for the rows whose documents are known.

    The others cannot be tested, so each extends the intervals by one rank at their upper end.
    """
    found = {row.run: marks[row.run, row.task] for row in rankable if row.main and (row.run, row.task) in marks}
    found = {run: own for run, own in found.items() if own.metric == rankable[0].metric}
    first = next(iter(found.values()), None)
    known = {run: own for run, own in found.items() if np.array_equal(own.ids, first.ids)}
    if len(known) < 2:
        return {}
    task = TaskScores(np.stack([own.scores for own in known.values()]), first.images)
    intervals = rank_intervals([task], higher_is_better=rankable[0].higher_is_better)
    others = len(rankable) - len(known)
    return {run: (low, high + others) for run, (low, high) in zip(known, intervals, strict=True)}
