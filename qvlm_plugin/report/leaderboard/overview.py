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
"""What the runs of one configuration have in common; they may differ in the seed of the calibration draw."""

TOLD = ("options", "arguments", "backend", "dtype", "device", "calibration", "model_fingerprint")
"""What tells configurations of the same model, method and scheme apart."""

Place = tuple[int, int]
"""The best and the worst rank by the mean over benchmarks that the documents do not exclude."""


@dataclass(frozen=True)
class Configuration:
    """One row of the overview.

    Attributes:
        name: a short hash of what its runs have in common.
        variant: what sets it apart from configurations of the same model, method and scheme; empty where nothing does.
        entries: its runs by evaluation (a place in the groups); several where seeds differ.
    """

    name: str
    variant: str
    entries: Mapping[int, tuple[Entry, ...]]

    @property
    def main(self) -> Row:
        """A row that stands for all."""
        return next(iter(self.entries.values()))[0].main


@dataclass(frozen=True)
class Overview:
    """The configurations of groups that belong together.

    Attributes:
        apart: whether the groups are on stand-in data or on a part of the documents.
        benchmarks: places in the groups of one evaluation for each task: that of most configurations.
        others: places of all other evaluations.
        configurations: rows.
        places: by a configuration's name, for those that have a rank in all benchmarks.
    """

    apart: bool
    benchmarks: tuple[int, ...]
    others: tuple[int, ...]
    configurations: tuple[Configuration, ...]
    places: Mapping[str, Place]


def overviews(found: Sequence[Group], marks: Mapping[tuple[str, str], Marks]) -> list[Overview]:
    """An overview of whole benchmarks and one of those apart, where there are any."""
    return [
        _overview(apart, {place: group for place, group in enumerate(found) if group.apart == apart}, marks)
        for apart in dict.fromkeys(group.apart for group in found)
    ]


def _overview(apart: bool, own: Mapping[int, Group], marks: Mapping[tuple[str, str], Marks]) -> Overview:
    entries: dict[tuple, dict[int, list[Entry]]] = defaultdict(lambda: defaultdict(list))
    for place, group in own.items():
        for entry in group.entries:
            entries[tuple(getattr(entry.main, name) for name in SAME)][place].append(entry)
    keys = {key: _name(key) for key in entries}
    variants = _variants([*entries])
    configurations = tuple(
        Configuration(
            keys[key],
            variants[key],
            {place: tuple(sorted(runs, key=lambda entry: entry.main.seed or 0)) for place, runs in cells.items()},
        )
        for key, cells in entries.items()
    )
    popular = _popular(own)
    others = tuple(place for place in own if place not in popular)
    return Overview(apart, popular, others, configurations, _places(configurations, popular, own, marks))


def _name(key: tuple) -> str:
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]


def _variants(keys: Sequence[tuple]) -> dict[tuple, str]:
    """Of each configuration what differs within its model, method and scheme."""
    families: dict[tuple, list[tuple]] = defaultdict(list)
    for key in keys:
        families[key[SAME.index("model")], key[SAME.index("method")], key[SAME.index("scheme")]].append(key)
    return {key: _variant(key, family) for family in families.values() for key in family}


def _variant(key: tuple, family: Sequence[tuple]) -> str:
    parts = []
    for name in TOLD:
        values = [other[SAME.index(name)] for other in family]
        if len(set(values)) == 1:
            continue
        value = key[SAME.index(name)] or f"no {name}"
        if name == "options":  # all of them are there: those that all share say nothing
            shared = reduce(set.__and__, (set((other or "").split(", ")) for other in values))
            value = ", ".join(part for part in value.split(", ") if part not in shared)
        parts.append(value[:8] if name == "model_fingerprint" else value)
    return ", ".join(part for part in parts if part)


def _popular(own: Mapping[int, Group]) -> tuple[int, ...]:
    """Of each task the evaluation that most runs, and then most documents, are in."""
    best: dict[str, int] = {}
    for place, group in own.items():
        task = group.entries[0].main.task
        if task not in best or _size(group) > _size(own[best[task]]):
            best[task] = place
    return tuple(best.values())


def _size(group: Group) -> tuple[bool, int, int]:
    return bool(group.name), len(group.entries), group.entries[0].main.documents


def _places(
    configurations: Sequence[Configuration],
    benchmarks: Sequence[int],
    own: Mapping[int, Group],
    marks: Mapping[tuple[str, str], Marks],
) -> dict[str, Place]:
    """Rank intervals by the mean over the benchmarks that are shares.

    Nothing is known where a configuration lacks a benchmark, a rank, or the samples by which it is tested.
    """
    shares = [
        place
        for place in benchmarks
        if all(entry.main.percent and entry.main.higher_is_better for entry in own[place].entries)
    ]
    scores = {one.name: _scores(one, shares, marks) for one in configurations}
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


def _scores(one: Configuration, shares: Sequence[int], marks: Mapping[tuple[str, str], Marks]) -> list[Marks]:
    """Its documents in each benchmark, with scores averaged over its runs; empty where something is missing."""
    tasks = []
    for place in shares:
        runs = one.entries.get(place, ())
        own = [marks.get((entry.main.run, entry.main.task)) for entry in runs]
        if not own or any(entry.main.rank is None or not entry.main.main for entry in runs):
            return []
        if any(run is None or not np.array_equal(run.ids, own[0].ids) for run in own):
            return []
        mean = np.mean([run.scores for run in own], axis=0)
        tasks.append(Marks(own[0].metric, own[0].ids, mean, own[0].images, own[0].outcomes))
    return tasks
