"""Read the samples files of lmms-eval: each document's answer and scores."""

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
from qvlm_plugin.report.leaderboard.schema import samples_prefix
from qvlm_plugin.report.results import Score, read_results

FIELDS = {"doc_id", "doc_hash", "target", "input", "input_media", "filtered_resps", "resps", "token_counts"}
"""Keys of a logged document that are not metrics (lmms_eval.evaluator, lmms_eval.loggers)."""


@dataclass(frozen=True)
class Document:
    """One document of a task, with a run's answer to it.

    Attributes:
        id: its index in the task's split.
        target, input: the reference answer and the prompt's text, as logged.
        answer: the generated text, stripped; for multiple choice, the index of the likeliest choice.
        image: digest of the document's images (``input_media``), empty if it has none; None if not recorded. Runs of
            this package record it for all documents. The harness itself records only images that a data set stores as
            paths, URLs or bytes, not those that ``datasets`` decodes, as in scienceqa, vizwiz_vqa_val and vqav2_val.
        metrics: its numeric scores. A task may give a metric to only some of its documents.
        records: names of metrics logged as records, from which tasks compute a score of all documents. If a record has
            a ``score``, it is in ``metrics``.
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
        tasks: the documents of each task, by ascending id.
        tokens_per_second: speed of generation; None if not recorded, or if low bits are simulated.
        totals: scores by task and metric that are computed from all documents at once, not as a mean.
    """

    file: Path
    run: dict[str, Any] | None
    tasks: Mapping[str, tuple[Document, ...]]
    tokens_per_second: float | None = None
    totals: Mapping[tuple[str, str], float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Method and scheme; for other packages' models the folder, which lmms-eval names after the model."""
        return f"{self.run.get('method', '?')} {self.run.get('scheme', '?')}" if self.run else self.file.parent.name

    @property
    def metrics(self) -> list[str]:
        """The metrics that any document has a score of, sorted."""
        return sorted({name for documents in self.tasks.values() for each in documents for name in each.metrics})


def read_samples(path: Path) -> list[RunSamples]:
    """The runs of a results file, or of all results files below a folder.

    Raises:
        QVLMError: there is no results file, a run was made without ``--log_samples``, or a file is not readable.
    """
    runs: dict[Path, list[Score]] = {}
    for score in read_results([path]):
        runs.setdefault(score.file, []).append(score)
    if not runs:
        raise QVLMError(f"{path} contains no scores to compare")
    found = []
    for file, scores in runs.items():
        run = scores[0].run
        with concerning(f"samples of {file}"):
            tasks = _read_tasks(file, run or {})
            found.append(RunSamples(file, run, tasks, scores[0].tokens_per_second, _totals(scores, tasks)))
    return found


def _totals(scores: Sequence[Score], tasks: Mapping[str, Sequence[Document]]) -> dict[tuple[str, str], float]:
    """Scores of metrics logged as records that are not the mean of the records' scores."""
    found = {}
    for score in scores:
        documents = [document for document in tasks.get(score.task, ()) if score.metric in document.records]
        parts = [document.metrics[score.metric] for document in documents if score.metric in document.metrics]
        if parts and score.value is not None and not is_mean(score.value, parts):
            found[score.task, score.metric] = score.value
    return found


def is_mean(value: float, parts: Sequence[float]) -> bool:
    """Whether a score is the mean of the documents' scores, up to the rounding to five digits that some tasks do."""
    return abs(value - math.fsum(parts) / len(parts)) < 1e-5


def check_same_documents(first: RunSamples, second: RunSamples) -> None:
    """Check that two runs can be paired: same tasks, document ids, targets, inputs and, if both record them, images.

    lmms-eval's ``doc_hash`` cannot be used: it is the same for every document.

    Raises:
        QVLMError: they cannot be paired.
    """
    where = f"{first.file} and {second.file}"
    if alone := sorted(first.tasks.keys() ^ second.tasks.keys()):
        raise QVLMError(f"{where} do not cover the same tasks: only one of them has samples of {', '.join(alone)}")
    for task in first.tasks:
        ones, others = ({document.id: document for document in run.tasks[task]} for run in (first, second))
        if alone := sorted(ones.keys() ^ others.keys()):
            raise QVLMError(
                f"{where} do not cover the same documents of task {task}: {len(alone)} are in only one of them, for "
                f"example document {alone[0]}"
            )
        for index, one in ones.items():
            for part in ("target", "input", "image"):
                values = getattr(one, part), getattr(others[index], part)
                if None not in values and values[0] != values[1]:
                    raise QVLMError(
                        f"{where} do not cover the same documents: the {part} of document {index} of task {task} "
                        "differs"
                    )


def saw_all_images(answers: Mapping[str, Any] | None, documents: int) -> bool:
    """Whether a run recorded the images of all documents, so that those without a record have no image.

    Early versions recorded nothing for documents without an image, nor for answers found in a cache.

    Args:
        answers: the task's entry in ``qvlm.answers``.
        documents: number of the task's documents.
    """
    return sum((answers or {}).get(name, 0) for name in ("generated", "found_in_cache")) >= documents


def _read_tasks(results: Path, run: Mapping[str, Any]) -> dict[str, tuple[Document, ...]]:
    prefix = samples_prefix(results)
    files = sorted(results.parent.glob(f"{glob.escape(prefix)}*.jsonl"))
    if not files:
        raise QVLMError(f"{results}: no {prefix}*.jsonl in the same folder; run lmms-eval with --log_samples")
    tasks = {file.stem.removeprefix(prefix): tuple(_read_task(file)) for file in files}
    for task, documents in tasks.items():
        if saw_all_images((run.get("answers") or {}).get(task), len(documents)):
            tasks[task] = tuple(replace(document, image=document.image or "") for document in documents)
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
        with file.open(encoding="utf-8", newline="\n") as lines:  # answers may contain other line separators
            for number, line in enumerate(lines, 1):  # noqa: B007
                yield document(parse_json(line))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise QVLMError(f"{file} is not a samples file of lmms-eval: line {number}: {error!r}") from error


def document(sample: dict[str, Any]) -> Document:
    """Parse one line of a samples file.

    Raises:
        KeyError, TypeError, ValueError: the line is not a sample.
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
    """A metric's logged number, or the ``score`` of its logged record; None if there is neither."""
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
        case [[_, "True" | "False"], *_]:  # each choice's log-likelihood, and whether it is the greedy answer
            likelihoods = [float(likelihood) for likelihood, _ in responses]
            return str(likelihoods.index(max(likelihoods)))
    return json.dumps(responses)
