"""Runs of one configuration over all benchmarks: the rows of the leaderboard's overview."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np

from qvlm_plugin.report.leaderboard.documents import Marks
from qvlm_plugin.report.leaderboard.intervals import TaskScores, rank_intervals
from qvlm_plugin.report.leaderboard.row import Row
from qvlm_plugin.report.leaderboard.view import Entry, Group

SAME = (
    "model", "model_fingerprint", "method", "scheme", "options", "arguments", "backend", "dtype", "device",
    "calibration",
)  # fmt: skip
"""Fields that the runs of one configuration share; they may differ in the seed of the calibration draw."""

DISTINGUISHING = ("options", "arguments", "backend", "dtype", "device", "calibration", "model_fingerprint")
"""Fields that distinguish configurations of the same model, method and scheme."""

RankInterval = tuple[int, int]
"""The best and the worst rank by the mean over benchmarks that the documents do not exclude."""


@dataclass(frozen=True)
class Configuration:
    """One row of the overview.

    Attributes:
        name: a short hash of the fields that its runs share.
        variant: how it differs from configurations of the same model, method and scheme; empty if it does not.
        entries: its runs by evaluation (an index of the groups); several if seeds differ.
    """

    name: str
    variant: str
    entries: Mapping[int, tuple[Entry, ...]]

    @property
    def main(self) -> Row:
        """A row that represents all."""
        return next(iter(self.entries.values()))[0].main


@dataclass(frozen=True)
class Overview:
    """The configurations of groups that belong together.

    Attributes:
        apart: whether the groups are on stand-in data or on a part of the documents.
        benchmarks: indices of the groups that are shown first: for each task the evaluation with most configurations.
        others: indices of all other groups.
        configurations: the rows.
        rank_intervals: rank intervals by configuration, for those ranked in all benchmarks.
    """

    apart: bool
    benchmarks: tuple[int, ...]
    others: tuple[int, ...]
    configurations: tuple[Configuration, ...]
    rank_intervals: Mapping[str, RankInterval]


def overviews(found: Sequence[Group], marks: Mapping[tuple[str, str], Marks]) -> list[Overview]:
    """An overview of complete benchmarks, and one of stand-in data and parts of benchmarks, if there are any."""
    return [
        _overview(apart, {index: group for index, group in enumerate(found) if group.apart == apart}, marks)
        for apart in dict.fromkeys(group.apart for group in found)
    ]


def _overview(apart: bool, own: Mapping[int, Group], marks: Mapping[tuple[str, str], Marks]) -> Overview:
    entries: dict[tuple, dict[int, list[Entry]]] = defaultdict(lambda: defaultdict(list))
    for index, group in own.items():
        for entry in group.entries:
            entries[tuple(getattr(entry.main, name) for name in SAME)][index].append(entry)
    keys = {key: _name(key) for key in entries}
    variants = _variants([*entries])
    configurations = tuple(
        Configuration(
            keys[key],
            variants[key],
            {index: tuple(sorted(runs, key=lambda entry: entry.main.seed or 0)) for index, runs in cells.items()},
        )
        for key, cells in entries.items()
    )
    popular = _popular(own)
    others = tuple(index for index in own if index not in popular)
    return Overview(apart, popular, others, configurations, _rank_intervals(configurations, popular, own, marks))


def _name(key: tuple) -> str:
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]


def _variants(keys: Sequence[tuple]) -> dict[tuple, str]:
    """How each configuration differs from others of its model, method and scheme."""
    families: dict[tuple, list[tuple]] = defaultdict(list)
    for key in keys:
        families[key[SAME.index("model")], key[SAME.index("method")], key[SAME.index("scheme")]].append(key)
    return {key: _variant(key, family) for family in families.values() for key in family}


def _variant(key: tuple, family: Sequence[tuple]) -> str:
    parts = []
    for name in DISTINGUISHING:
        values = [other[SAME.index(name)] for other in family]
        if len(set(values)) == 1:
            continue
        value = key[SAME.index(name)] or f"no {name}"
        if name == "options":  # leave out those that all share
            shared = reduce(set.__and__, (set((other or "").split(", ")) for other in values))
            value = ", ".join(part for part in value.split(", ") if part not in shared)
        parts.append(value[:8] if name == "model_fingerprint" else value)
    return ", ".join(part for part in parts if part)


def _popular(own: Mapping[int, Group]) -> tuple[int, ...]:
    """The evaluation of each task with the most runs and, if equal, the most documents."""
    best: dict[str, int] = {}
    for index, group in own.items():
        task = group.entries[0].main.task
        if task not in best or _size(group) > _size(own[best[task]]):
            best[task] = index
    return tuple(best.values())


def _size(group: Group) -> tuple[bool, int, int]:
    return bool(group.name), len(group.entries), group.entries[0].main.documents


def _rank_intervals(
    configurations: Sequence[Configuration],
    benchmarks: Sequence[int],
    own: Mapping[int, Group],
    marks: Mapping[tuple[str, str], Marks],
) -> dict[str, RankInterval]:
    """Rank intervals by the mean over the benchmarks whose scores are shares.

    Configurations that lack a benchmark, a rank, or samples have none.
    """
    shares = [
        index
        for index in benchmarks
        if all(entry.main.percent and entry.main.higher_is_better for entry in own[index].entries)
    ]
    scores = {configuration.name: _scores(configuration, shares, marks) for configuration in configurations}
    known = {name: tasks for name, tasks in scores.items() if tasks}
    first = next(iter(known.values()), ())
    known = {
        name: tasks
        for name, tasks in known.items()
        if all(np.array_equal(mine.ids, other.ids) for mine, other in zip(tasks, first, strict=True))
    }
    if not known:
        return {}
    stacked = [
        TaskScores(np.stack([tasks[number].scores for tasks in known.values()]), first[number].images)
        for number in range(len(shares))
    ]
    return dict(zip(known, rank_intervals(stacked, higher_is_better=True), strict=True))


def _scores(configuration: Configuration, shares: Sequence[int], marks: Mapping[tuple[str, str], Marks]) -> list[Marks]:
    """Its documents in each benchmark, with scores averaged over its runs; empty if anything is missing."""
    tasks = []
    for index in shares:
        runs = configuration.entries.get(index, ())
        own = [marks.get((entry.main.run, entry.main.task)) for entry in runs]
        if not own or any(entry.main.rank is None or not entry.main.main for entry in runs):
            return []
        if any(run is None or not np.array_equal(run.ids, own[0].ids) for run in own):
            return []
        mean = np.mean([run.scores for run in own], axis=0)
        tasks.append(Marks(own[0].metric, own[0].ids, mean, own[0].images, own[0].outcomes))
    return tasks
