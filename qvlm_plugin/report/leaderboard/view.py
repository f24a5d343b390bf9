"""The ranked rows grouped by evaluation and run, as the Markdown and the page show them."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from qvlm_plugin.report.leaderboard.row import Row


@dataclass(frozen=True)
class Entry:
    """One run in one evaluation.

    Attributes:
        main: its row for the main metric.
        scores: its rows by metric.
    """

    main: Row
    scores: dict[str, Row]


@dataclass(frozen=True)
class Group:
    """One evaluation.

    Attributes:
        name: the evaluation's hash; empty if unknown.
        title: task, data and documents, and how it differs from evaluations that would have the same title.
        label: the task and its difference, short enough for a column.
        apart: whether it is on stand-in data or on a part of the documents.
        metrics: names of the metrics, the main one first.
        entries: its runs, best first.
    """

    name: str
    title: str
    label: str
    apart: bool
    metrics: tuple[str, ...]
    entries: tuple[Entry, ...]


def groups(rows: Sequence[Row]) -> list[Group]:
    """Ranked rows by evaluation, in their order."""
    found: dict[tuple, list[Row]] = defaultdict(list)
    for row in rows:
        found[row.apart, row.task, row.evaluation or ""].append(row)
    return _distinguished([_group(key[2], own) for key, own in found.items()])


def _group(name: str, rows: Sequence[Row]) -> Group:
    runs: dict[str, dict[str, Row]] = defaultdict(dict)
    for row in rows:
        runs[row.run][row.metric] = row
    entries = []
    for scores in runs.values():
        main = next((row for row in scores.values() if row.main), next(iter(scores.values())))
        entries.append(Entry(main, scores))
    metrics = dict.fromkeys([*(entry.main.metric for entry in entries), *(row.metric for row in rows)])
    return Group(name, _title(rows[0]), rows[0].task, rows[0].apart, tuple(metrics), tuple(entries))


def _title(row: Row) -> str:
    where = " ".join(part for part in (row.dataset, row.dataset_config, row.split) if part)
    return f"{row.task} ({where + ', ' if where else ''}{_documents(row)} documents)"


def _documents(row: Row) -> str:
    return f"{row.documents:,}" + (f" of {row.documents_total:,}" if row.documents != row.documents_total else "")


def _distinguished(found: Sequence[Group]) -> list[Group]:
    """The groups with unique titles and labels."""
    for part, traits in (("title", _traits), ("label", lambda row: (_documents(row), *_traits(row)))):
        alike: dict[str, list[Group]] = defaultdict(list)
        for group in found:
            alike[getattr(group, part)].append(group)
        suffixes = {
            id(group): suffix
            for own in alike.values()
            for group, suffix in zip(own, _suffixes([traits(group.entries[0].main) for group in own]), strict=True)
        }
        texts = [": ".join(filter(None, (getattr(group, part), suffixes[id(group)]))) for group in found]
        found = [replace(group, **{part: text}) for group, text in zip(found, texts, strict=True)]
    return list(found)


def _suffixes(traits: Sequence[tuple[str, ...]]) -> list[str]:
    """The traits that differ, in their order, as many as are needed to make all suffixes unique."""
    chosen: list[int] = []
    for index, values in enumerate(zip(*traits, strict=True)):
        suffixes = {tuple(own[at] for at in chosen) for own in traits}
        if len(suffixes) < len(traits) and len(set(values)) > 1:
            chosen.append(index)
    return [", ".join(own[index] for index in chosen if own[index]) for own in traits]


def _traits(row: Row) -> tuple[str, ...]:
    """Properties in which evaluations of the same task and data can differ; hashes are shortened."""
    if row.evaluation is None:
        return "documents unknown", "", "", ""
    return (
        "",
        f"data {row.data[:8]}" if row.data else "data unknown",
        f"prompt {row.protocol[:8]}",
        f"documents {row.samples_digest[:8]}" if row.samples_digest else "documents unknown",
    )
