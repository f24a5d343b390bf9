"""Read results files into rows. A file that cannot be used is reported and does not affect the others."""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.reading import concerning
from qvlm_plugin.report.leaderboard.documents import Coverage, Marks, read_coverage
from qvlm_plugin.report.leaderboard.row import Row
from qvlm_plugin.report.leaderboard.schema import (
    ResultsFile,
    main_metric,
    metric_list,
    numbers,
    read_results_file,
    samples_file,
)
from qvlm_plugin.report.results import BYPASS
from qvlm_plugin.report.samples import is_mean
from qvlm_plugin.report.seal import seal
from qvlm_plugin.report.shares import PERCENT, scale, share_interval

STAND_IN = "stand-in data"
LIMITED = "a part of the documents"
CALIBRATED = "calibrated on evaluated documents"
UNCOMPARED = "not all documents compared with the calibration's"
INCOMPLETE = "samples do not match"
EDITED = "edited after the run"
UNRANKED = {CALIBRATED, UNCOMPARED, INCOMPLETE, EDITED}
"""Notes of rows that get no rank."""


@dataclass(frozen=True)
class Problem:
    """A fault of a file, described in one line."""

    file: str
    message: str


@dataclass
class Board:
    """Rows, and the problems found while reading them.

    Attributes:
        rows: rows of all runs.
        problems: file by file.
        marks: documents by a row's ``run`` and ``task``, if the results have usable samples.
    """

    rows: list[Row] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    marks: dict[tuple[str, str], Marks] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """A parsed results file.

    Attributes:
        file: its path.
        hash: SHA-256 of its content.
        parsed: its content.
        is_intact: whether its seal, if it has one, matches its content.
        coverage: summary of each task's samples file; tasks without one are missing.
        problems: faults of single tasks.
    """

    file: Path
    hash: str
    parsed: ResultsFile
    is_intact: bool
    coverage: Mapping[str, Coverage]
    problems: tuple[str, ...]


def read_run(file: Path) -> Run:
    """Read a results file and its samples.

    Raises:
        QVLMError: the results file cannot be used; faults of samples are listed in ``problems``.
    """
    blob, content, parsed = read_results_file(file)
    problems, coverage = [], {}
    for task in parsed.counts:
        samples = samples_file(file, task)
        if "/" in task or not samples.is_file():
            continue
        try:
            coverage[task] = _without_parts(read_coverage(samples, main_metric(parsed, task)), parsed, task)
        except QVLMError as error:
            problems.append(str(error))
            coverage[task] = Coverage(-1, "", {})
    provenance = parsed.qvlm
    intact = provenance is None or provenance.seal is None or provenance.seal == seal(content)
    return Run(file, hashlib.sha256(blob).hexdigest(), parsed, intact, coverage, tuple(problems))


def _without_parts(coverage: Coverage, parsed: ResultsFile, task: str) -> Coverage:
    """Drops the documents' scores if the task's score is not their mean: paired tests would not apply to it."""
    if coverage.marks is None or metric_list(parsed, task).get(coverage.marks.metric, {}).get("aggregation") == "mean":
        return coverage
    values = [value for name, _, value in numbers(parsed.results[task]) if name == coverage.marks.metric]
    fits = any(is_mean(value, [coverage.means[coverage.marks.metric]]) for value in values)
    return coverage if fits else replace(coverage, marks=None)


def read_board(files: Sequence[Path], base: Path) -> Board:
    """The rows of results files, not yet ranked.

    Args:
        files: see `find_results_files`.
        base: folder to which file names in rows are relative.
    """
    board = Board()
    seen: dict[str, str] = {}
    for file in files:
        name = os.path.relpath(file, base)
        try:
            with concerning(name):
                run = read_run(file)
            if run.hash in seen:
                board.problems.append(Problem(name, f"is a copy of {seen[run.hash]}"))
                continue
            seen[run.hash] = name
            with concerning(name):
                rows = [*_rows(run, base, board.problems)]
            if not rows:
                board.problems.append(Problem(name, "contains no score"))
            board.rows += rows
            usable = {row.task for row in rows if row.samples_digest}
            kept = {task: one.marks for task, one in run.coverage.items() if task in usable}
            board.marks |= {(run.hash[:16], task): marks for task, marks in kept.items() if marks}
        except QVLMError as error:
            board.problems.append(Problem(name, str(error).removeprefix(f"{file} ")))
    return board


def _rows(run: Run, base: Path, problems: list[Problem]) -> Iterator[Row]:
    parsed, name = run.parsed, os.path.relpath(run.file, base)
    problems += [Problem(name, message) for message in run.problems]
    if not run.is_intact:
        problems.append(Problem(name, f"was {EDITED}: its seal does not match"))
    common = _run_facts(run) | {"run": run.hash[:16], "file": name}
    for task, metrics in parsed.results.items():
        if task not in parsed.counts:  # a group of tasks, which have rows of their own
            continue
        main = main_metric(parsed, task)
        order = [main, *metric_list(parsed, task)]
        scores = [*_scores(task, metrics, name, problems)]
        scores.sort(key=lambda score: order.index(score[0]) if score[0] in order else len(order))
        facts = _task_facts(run, task, base, name, problems)
        directions = parsed.higher_is_better.get(task) or {}
        for metric, value, stderr in scores:
            documents = facts["documents"] if metric == main else None  # others may cover only some documents
            low, high = share_interval(metric, value, stderr, documents) or (None, None)
            yield Row(
                **common,
                **facts,
                task=task,
                metric=metric,
                main=metric == main,
                value=value,
                percent=scale(metric, value) == PERCENT,
                stderr=stderr,
                wilson_low=low,
                wilson_high=high,
                higher_is_better=directions.get(metric) is not False,
            )


def _scores(
    task: str, metrics: Mapping[str, Any], name: str, problems: list[Problem]
) -> Iterator[tuple[str, float, float | None]]:
    for metric, kind, value in numbers(metrics):
        if metric == BYPASS:
            problems.append(Problem(name, f"{task} was not scored (--predict_only)"))
            continue
        if not math.isfinite(value):
            problems.append(Problem(name, f"{task} {metric} is {value}; left out"))
            continue
        stderr = metrics.get(f"{metric}_stderr,{kind}")
        known = isinstance(stderr, int | float) and math.isfinite(stderr)
        yield metric, value, stderr if known else None


def _run_facts(run: Run) -> dict[str, Any]:
    parsed, qvlm = run.parsed, run.parsed.qvlm
    facts = {
        "model": parsed.model_name or parsed.config.model or "?",
        "method": None,
        "scheme": None,
        "date": parsed.date,
        "tokens_per_second": parsed.tokens_per_second,
    }
    if qvlm is None:
        if parsed.config.model and parsed.config.model != facts["model"]:
            facts["model"] += f" ({parsed.config.model})"
        arguments = parsed.config.model_args
        return facts | {"arguments": str(arguments) if arguments else None}
    decoder, vision = qvlm.bits.get("decoder", {}), qvlm.bits.get("vision", {})
    copied = ("packed_bytes", "search_seconds", "backend", "dtype", "device", "plan_hash", "commit")
    return facts | {
        "model": f"{qvlm.pretrained or facts['model']}{f'@{qvlm.revision}' if qvlm.revision else ''}",
        "method": qvlm.method,
        "scheme": qvlm.scheme,
        "weight_bits": decoder.get("weight"),
        "activation_bits": decoder.get("activation"),
        "vision_weight_bits": vision.get("weight"),
        "vision_activation_bits": vision.get("activation"),
        "calibration": qvlm.calibration and qvlm.calibration.source,
        "seed": qvlm.calibration and qvlm.calibration.seed,
        "options": ", ".join(f"{key}={value}" for key, value in qvlm.options.items()) or None,
        "model_fingerprint": qvlm.model_fingerprint,
        "versions": ", ".join(f"{key} {value}" for key, value in sorted(qvlm.versions.items())) or None,
        **{key: getattr(qvlm, key) for key in copied},
        **qvlm.measured_bytes,
    }


def _task_facts(run: Run, task: str, base: Path, name: str, problems: list[Problem]) -> dict[str, Any]:
    parsed, counts, config = run.parsed, run.parsed.counts[task], run.parsed.configs.get(task, {})
    origin = parsed.qvlm.data.get(task) if parsed.qvlm else None
    coverage = run.coverage.get(task)
    notes = []
    if parsed.qvlm and (origin.stand_in if origin else parsed.qvlm.stand_in):
        notes.append(STAND_IN)
    if counts.effective != counts.original or parsed.config.offset:
        notes.append(LIMITED)
    if parsed.qvlm and parsed.qvlm.calibration and parsed.qvlm.calibration.documents_also_evaluated:
        notes.append(CALIBRATED)
    if _left_out_of_comparison(parsed):
        notes.append(UNCOMPARED)
    if coverage and (message := misfit(task, counts.effective, parsed, coverage)):
        problems.append(Problem(name, message))
        notes.append(INCOMPLETE)
    if not run.is_intact:
        notes.append(EDITED)
    usable = coverage is not None and INCOMPLETE not in notes
    return {
        "documents": counts.effective,
        "documents_total": counts.original,
        "notes": tuple(notes),
        "apart": STAND_IN in notes or LIMITED in notes,
        "dataset": _text(origin.dataset if origin else None, config.get("dataset_path")),
        "dataset_config": _text(origin.config if origin else None, config.get("dataset_name")),
        "split": _text(origin.split if origin else None, config.get("test_split") or config.get("validation_split")),
        "data": origin.identity if origin else None,
        "protocol": protocol_hash(task, parsed),
        "samples_digest": coverage.digest if usable else None,
        "samples": os.path.relpath(samples_file(run.file, task), base) if coverage is not None else None,
    }


def _left_out_of_comparison(parsed: ResultsFile) -> bool:
    """Whether fewer documents were compared with the calibration's than were evaluated.

    Early versions that resumed a run compared only the documents that they answered themselves.
    """
    calibration = parsed.qvlm and parsed.qvlm.calibration
    if not calibration or parsed.qvlm.method == "none" or calibration.documents_compared is None:
        return False
    return calibration.documents_compared < sum(counts.effective for counts in parsed.counts.values())


def misfit(task: str, evaluated: int, parsed: ResultsFile, coverage: Coverage) -> str | None:
    """How a task's samples contradict its results; None if they match."""
    if coverage.count < 0:
        return f"{task}: its samples cannot be read"
    if coverage.count != evaluated:
        return f"{task}: {evaluated} documents were evaluated, but the samples file has {coverage.count}"
    for metric, entry in metric_list(parsed, task).items():
        if entry.get("aggregation") != "mean":
            continue
        values = [value for key, value in parsed.results[task].items() if key.partition(",")[0] == metric]
        if len(values) != 1 or metric not in coverage.means or not isinstance(values[0], int | float):
            continue
        if math.isfinite(values[0]) and abs(values[0] - coverage.means[metric]) > 1e-6:
            return f"{task}: {metric} is {values[0]:.6g}, but the samples' mean is {coverage.means[metric]:.6g}"
    return None


def protocol_hash(task: str, parsed: ResultsFile) -> str:
    """A short hash of a task's prompt, generation arguments, version and offset."""
    config = parsed.configs.get(task, {})
    choices = config.get("lmms_eval_specific_kwargs") or {}
    # lmms-eval writes the choices for all models, which are objects, and those that it used.
    taken = {key: value for key, value in choices.items() if not isinstance(value, dict)}
    names = ("doc_to_text", "doc_to_messages", "doc_to_choice", "description", "num_fewshot", "output_type")
    content = {name: _without_addresses(config.get(name)) for name in (*names, "generation_kwargs", "repeats")}
    system = parsed.qvlm.system_prompt if parsed.qvlm else None
    content |= {"kwargs": taken, "system": system or parsed.system_instruction}
    content |= {"version": parsed.versions.get(task), "offset": parsed.config.offset or 0}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _without_addresses(value: Any) -> Any:
    return re.sub(r" at 0x[0-9a-f]+", "", value) if isinstance(value, str) else value


def _text(*values: Any) -> str | None:
    return next((str(value) for value in values if value), None)
