"""The ranked rows as evaluations with their runs: what the Markdown and the page show."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from qvlm_plugin.report.leaderboard.row import Row


@dataclass(frozen=True)
class Entry:
    """One run in one evaluation.

    Attributes:
        main: its row of the main metric.
        scores: its rows by metric.
    """

    main: Row
    scores: dict[str, Row]


@dataclass(frozen=True)
class Group:
    """One evaluation.

    Attributes:
        name: the evaluation's; empty where it is not known.
        title: task, data and documents.
        apart: whether it is on stand-in data or on a part of the documents.
        metrics: names, the main one first.
        entries: best first.
    """

    name: str
    title: str
    apart: bool
    metrics: tuple[str, ...]
    entries: tuple[Entry, ...]


def groups(rows: Sequence[Row]) -> list[Group]:
    """Ranked rows by evaluation, in their order."""
    found: dict[tuple, list[Row]] = defaultdict(list)
    for row in rows:
        found[row.apart, row.task, row.evaluation or ""].append(row)
    return [_group(key[2], own) for key, own in found.items()]


def _group(name: str, rows: Sequence[Row]) -> Group:
    runs: dict[str, dict[str, Row]] = defaultdict(dict)
    for row in rows:
        runs[row.run][row.metric] = row
    entries = []
    for scores in runs.values():
        main = next((row for row in scores.values() if row.main), next(iter(scores.values())))
        entries.append(Entry(main, scores))
    metrics = dict.fromkeys([*(entry.main.metric for entry in entries), *(row.metric for row in rows)])
    return Group(name, _title(rows[0]), rows[0].apart, tuple(metrics), tuple(entries))


def _title(row: Row) -> str:
    where = " ".join(part for part in (row.dataset, row.dataset_config, row.split) if part)
    count = f"{row.documents:,}" + (f" of {row.documents_total:,}" if row.documents != row.documents_total else "")
    return f"{row.task} ({where + ', ' if where else ''}{count} documents)"
