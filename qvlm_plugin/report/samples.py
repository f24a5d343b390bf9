"""Read what lmms-eval logs of every document: its answer and its scores."""

import glob
import hashlib
import json
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.reading import concerning, parse_json
from qvlm_plugin.report.results import Score, read_results

FIELDS = {"doc_id", "doc_hash", "target", "input", "input_media", "filtered_resps", "resps", "token_counts"}
"""What lmms_eval.evaluator and lmms_eval.loggers log beside a document's metrics."""


@dataclass(frozen=True)
class Document:
    """One document of a task, with a run's answer to it.

    Attributes:
        id: its index in the task's split.
        target, input: the reference answer and the prompt's text, as logged.
        answer: the generated text without surrounding blanks; of a multiple choice, the index of the likeliest choice.
        image: digest of the images that the samples name (``input_media``), empty where they say that there is none;
            None where they do not tell. Runs of this package tell it of all documents; the harness by itself only names
            those that a data set holds as paths, addresses or bytes, not those that ``datasets`` decodes, as for
            scienceqa, vizwiz_vqa_val and vqav2_val.
        metrics: its numeric scores. A task may give a metric to some of its documents only.
        records: names of metrics that are logged as records, which tasks make into a score of all documents. Where a
            record has a ``score``, it is in ``metrics``.
    """

    id: int
    target: str
    input: str
    answer: str
    image: str | None
    metrics: Mapping[str, float]
    records: frozenset[str] = frozenset()


@dataclass(frozen=True)
class RunSamples:
    """The documents of one run.

    Attributes:
        file: the results file.
        run: the run's ``qvlm`` provenance; None for models of other packages.
        tasks: of each task the documents, by ascending id.
        totals: by task and metric the scores that are made of all documents at once, and are no mean of theirs.
    """

    file: Path
    run: dict[str, Any] | None
    tasks: Mapping[str, tuple[Document, ...]]
    totals: Mapping[tuple[str, str], float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Method and scheme; of other packages' models the folder, which lmms-eval names after the model."""
        return f"{self.run.get('method', '?')} {self.run.get('scheme', '?')}" if self.run else self.file.parent.name


def read_samples(path: Path) -> list[RunSamples]:
    """The runs of a results file, or of all results files below a folder.

    Raises:
        QVLMError: there is no results file, a run was made without ``--log_samples``, or a file is not readable.
    """
    scores = read_results([path])
    runs = {score.file: score.run for score in scores}
    if not runs:
        raise QVLMError(f"{path} holds no scores to compare")
    found = []
    for file, run in runs.items():
        with concerning(f"samples of {file}"):
            tasks = _read_tasks(file, run or {})
            totals = _totals([score for score in scores if score.file == file], tasks)
            found.append(RunSamples(file, run, tasks, totals))
    return found


def _totals(scores: Sequence[Score], tasks: Mapping[str, Sequence[Document]]) -> dict[tuple[str, str], float]:
    """Of metrics whose documents log records, the scores that are not the mean of the records' scores."""
    found = {}
    for one in scores:
        documents = [document for document in tasks.get(one.task, ()) if one.metric in document.records]
        parts = [document.metrics[one.metric] for document in documents if one.metric in document.metrics]
        if parts and one.value is not None and not is_mean(one.value, parts):
            found[one.task, one.metric] = one.value
    return found


def is_mean(value: float, parts: Sequence[float]) -> bool:
    """Whether a score is the mean of the documents' own, up to rounding to five digits, which some tasks do."""
    return abs(value - math.fsum(parts) / len(parts)) < 1e-5


def check_same_documents(first: RunSamples, second: RunSamples) -> None:
    """Two runs can be paired: the same tasks, document ids, targets, inputs and, where both name them, images.

    lmms-eval's ``doc_hash`` is no help: it is the same for every document.

    Raises:
        QVLMError: they cannot.
    """
    where = f"{first.file} and {second.file}"
    if alone := sorted(first.tasks.keys() ^ second.tasks.keys()):
        raise QVLMError(f"{where} do not cover the same tasks: only one of them has samples of {', '.join(alone)}")
    for task in first.tasks:
        ones, others = ({document.id: document for document in run.tasks[task]} for run in (first, second))
        if alone := sorted(ones.keys() ^ others.keys()):
            raise QVLMError(
                f"{where} do not cover the same documents of task {task}: {len(alone)} are in one of them only, for "
                f"example document {alone[0]}"
            )
        for index, one in ones.items():
            for part in ("target", "input", "image"):
                values = getattr(one, part), getattr(others[index], part)
                if None not in values and values[0] != values[1]:
                    raise QVLMError(
                        f"{where} do not cover the same documents: document {index} of task {task} has another {part}"
                    )


def saw_all_images(answers: Mapping[str, Any] | None, documents: int) -> bool:
    """Whether a run that names some images has named all, so that documents of which it names none have none.

    Early versions wrote nothing of documents without an image, and knew nothing of answers that were found in a cache.

    Args:
        answers: the task's entry in ``qvlm.answers``.
        documents: how many the task has.
    """
    return sum((answers or {}).get(name, 0) for name in ("generated", "found_in_cache")) >= documents


def _read_tasks(results: Path, run: Mapping[str, Any]) -> dict[str, tuple[Document, ...]]:
    prefix = f"{results.name.removesuffix('_results.json')}_samples_"
    files = sorted(results.parent.glob(f"{glob.escape(prefix)}*.jsonl"))
    if not files:
        raise QVLMError(f"{results} has no {prefix}*.jsonl beside it: run lmms-eval with --log_samples")
    tasks = {file.stem.removeprefix(prefix): tuple(_read_task(file)) for file in files}
    for task, documents in tasks.items():
        if saw_all_images((run.get("answers") or {}).get(task), len(documents)):
            tasks[task] = tuple(replace(one, image=one.image or "") for one in documents)
    return tasks


def _read_task(file: Path) -> list[Document]:
    documents: dict[int, Document] = {}
    for document in _read_file(file):
        if document.id in documents:
            raise QVLMError(f"{file} has document {document.id} twice; tasks with several filters cannot be paired")
        documents[document.id] = document
    return [documents[index] for index in sorted(documents)]


def _read_file(file: Path) -> Iterator[Document]:
    number = 0
    try:
        with file.open(encoding="utf-8", newline="\n") as lines:  # answers may hold any other line separator
            for number, line in enumerate(lines, 1):  # noqa: B007
                yield document(parse_json(line))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise QVLMError(f"{file} is not a samples file of lmms-eval: line {number}: {error!r}") from error


def document(sample: dict[str, Any]) -> Document:
    """One line of a samples file.

    Raises:
        KeyError, TypeError, ValueError: it is none.
    """
    return Document(
        id=operator.index(sample["doc_id"]),
        target=str(sample["target"]),
        input=str(sample["input"]),
        answer=_answer(sample["filtered_resps"]),
        image=_digest(sample.get("input_media")),
        metrics={
            name: float(number)
            for name, value in sample.items()
            if name not in FIELDS and (number := score_of(value)) is not None and math.isfinite(number)
        },
        records=frozenset(name for name, value in sample.items() if name not in FIELDS and isinstance(value, dict)),
    )


def score_of(value: Any) -> float | None:
    """The number that is logged of a document's metric, by itself or as the ``score`` of a record; None where none."""
    value = value.get("score") if isinstance(value, dict) else value
    return value if isinstance(value, int | float) else None


def _digest(media: list[str] | None) -> str | None:
    if not media:
        return None if media is None else ""
    return hashlib.sha256(json.dumps(media).encode()).hexdigest()


def _answer(responses: Any) -> str:
    if isinstance(responses, str):
        return responses.strip()
    match responses:
        case [[_, "True" | "False"], *_]:  # of each choice its log-likelihood, and whether it is the greedy answer
            likelihoods = [float(likelihood) for likelihood, _ in responses]
            return str(likelihoods.index(max(likelihoods)))
    return json.dumps(responses)
