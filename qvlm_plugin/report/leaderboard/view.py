"""The ranked rows as evaluations with their runs: what the Markdown and the page show."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

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
        title: task, data and documents, and what else differs from evaluations that would have the same title.
        label: the task, and the same; short enough for a column.
        apart: whether it is on stand-in data or on a part of the documents.
        metrics: names, the main one first.
        entries: best first.
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
    return _told_apart([_group(key[2], own) for key, own in found.items()])


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


def _told_apart(found: Sequence[Group]) -> list[Group]:
    """The groups with titles and labels of their own."""
    for part, traits in (("title", _traits), ("label", lambda row: (_documents(row), *_traits(row)))):
        twins: dict[str, list[Group]] = defaultdict(list)
        for group in found:
            twins[getattr(group, part)].append(group)
        suffixes = {
            id(group): suffix
            for own in twins.values()
            for group, suffix in zip(own, _suffixes([traits(group.entries[0].main) for group in own]), strict=True)
        }
        texts = [": ".join(filter(None, (getattr(group, part), suffixes[id(group)]))) for group in found]
        found = [replace(group, **{part: text}) for group, text in zip(found, texts, strict=True)]
    return list(found)


def _suffixes(traits: Sequence[tuple[str, ...]]) -> list[str]:
    """Of the traits, in their order, as many of those that differ as tell all apart."""
    chosen: list[int] = []
    for place, values in enumerate(zip(*traits, strict=True)):
        told = {tuple(own[at] for at in chosen) for own in traits}
        if len(told) < len(traits) and len(set(values)) > 1:
            chosen.append(place)
    return [", ".join(own[place] for place in chosen if own[place]) for own in traits]


def _traits(row: Row) -> tuple[str, ...]:
    """What evaluations of the same task and data can differ in; hashes are shortened."""
    if row.evaluation is None:
        return "documents unknown", "", "", ""
    return (
        "",
        f"data {row.data[:8]}" if row.data else "data unknown",
        f"prompt {row.protocol[:8]}",
        f"documents {row.samples_digest[:8]}" if row.samples_digest else "documents unknown",
    )
