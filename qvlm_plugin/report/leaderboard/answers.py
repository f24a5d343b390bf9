"""The answers of an evaluation's runs, for the page: documents on which runs differ, with each run's answer."""

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.reading import parse_json
from qvlm_plugin.report.leaderboard.documents import Marks
from qvlm_plugin.report.leaderboard.pictures import picture
from qvlm_plugin.report.leaderboard.view import Group
from qvlm_plugin.report.samples import document

DOCUMENTS, ANSWERS, PICTURES = 1000, 200_000, 300
"""Maximum numbers of an evaluation's documents, answers and pictures on the page."""

QUESTION, ANSWER = 2000, 500
"""Maximum lengths of texts in characters."""


@dataclass(frozen=True)
class Question:
    """A document on which runs differ.

    Attributes:
        id: index in the task's split.
        text, target: prompt and reference answer.
        image: number of its image; equal numbers are the same image.
        outcomes: the distinct answers, each with its score.
    """

    id: int
    text: str
    target: str
    image: int
    outcomes: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Answers:
    """The answers of one evaluation's runs.

    Attributes:
        differing: number of documents on which any two runs differ in answer or score.
        questions: those shown on the page, evenly spaced over all of them.
        pictures: data URIs by number of the image, if available.
        picks: each run's index into the outcomes of every question.
    """

    differing: int
    questions: tuple[Question, ...]
    pictures: Mapping[int, str]
    picks: Mapping[str, tuple[int, ...]]


def answers_of(group: Group, marks: Mapping[tuple[str, str], Marks], base: Path) -> Answers | None:
    """The answers of a group's runs; None if fewer than two have samples of the same documents.

    Args:
        group: an evaluation.
        marks: documents by run and task.
        base: folder to which file names in rows are relative.
    """
    found = [(entry.main, marks.get((entry.main.run, entry.main.task))) for entry in group.entries]
    found = [(row, own) for row, own in found if own is not None and own.metric == group.metrics[0]]
    found = [(row, own) for row, own in found if np.array_equal(own.ids, found[0][1].ids)]
    if len(found) < 2:
        return None
    hashes = np.stack([own.outcomes for _, own in found])
    differing = np.flatnonzero((hashes != hashes[0]).any(axis=0))
    count = min(len(differing), DOCUMENTS, max(1, ANSWERS // len(found)))
    kept = differing[np.linspace(0, len(differing) - 1, count).round().astype(int)] if count else differing
    ids = found[0][1].ids[kept].tolist()
    columns = {row.run: _read(base / row.samples, ids, group.metrics[0]) for row, _ in found}
    columns = {run: column for run, column in columns.items() if column is not None}
    if len(columns) < 2:
        return None
    _, images = np.unique(found[0][1].images[kept], return_inverse=True)
    questions, picks = [], {run: [] for run in columns}
    for index, image in zip(ids, images.tolist(), strict=True):
        answered = [column[index] for column in columns.values()]
        outcomes: dict[tuple[str, float], int] = {}
        for run, one in zip(columns, answered, strict=True):
            picks[run].append(outcomes.setdefault((one.answer, one.score), len(outcomes)))
        questions.append(Question(index, answered[0].text, answered[0].target, image, tuple(outcomes)))
    first = next(row for row, _ in found if row.run in columns)
    pictures = _pictures(base / first.samples, {one.id: one.image for one in questions})
    return Answers(len(differing), tuple(questions), pictures, {run: tuple(own) for run, own in picks.items()})


@dataclass(frozen=True)
class _Answered:
    """One line of a samples file."""

    text: str
    target: str
    answer: str
    score: float


def _read(file: Path, ids: Sequence[int], metric: str) -> dict[int, _Answered] | None:
    """A run's answers to the documents; None if the file has changed since it was read."""
    try:
        found = {
            answered.id: _Answered(
                answered.input[:QUESTION], answered.target[:ANSWER], answered.answer[:ANSWER], answered.metrics[metric]
            )
            for answered in map(document, _samples(file, frozenset(ids)))
        }
    except (OSError, ValueError, KeyError, TypeError, RecursionError, QVLMError):
        return None
    return found if len(found) == len(ids) else None


def _samples(file: Path, ids: Container[int]) -> Iterator[dict[str, Any]]:
    with file.open("rb") as lines:
        yield from (sample for sample in map(parse_json, lines) if sample["doc_id"] in ids)


def _pictures(file: Path, images: Mapping[int, int]) -> dict[int, str]:
    """Data URIs by number of the image, for at most `PICTURES` images.

    Args:
        file: a samples file.
        images: the number of each document's image, by document id.
    """
    found: dict[int, str] = {}
    for sample in _samples(file, images):
        image = images[sample["doc_id"]]
        if image not in found and len(found) < PICTURES and (uri := picture(sample.get("input_media"), file.parent)):
            found[image] = uri
    return found
