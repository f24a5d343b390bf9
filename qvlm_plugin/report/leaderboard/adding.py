"""Add a run to a shared folder, such as a checkout that collects results, after checking it."""

import re
from pathlib import Path

from qvlm_plugin.atomic import write_file
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.report.leaderboard.ranking import with_evaluations
from qvlm_plugin.report.leaderboard.reading import (
    CALIBRATED,
    EDITED,
    INCOMPLETE,
    LIMITED,
    UNCOMPARED,
    Run,
    read_board,
    read_run,
)
from qvlm_plugin.report.leaderboard.row import Row
from qvlm_plugin.report.leaderboard.schema import SUFFIX, samples_file
from qvlm_plugin.report.samples import saw_all_images

NEEDED = ("plan_hash", "table_hash", "model_fingerprint", "seal")
SAME = ("model_fingerprint", "plan_hash", "backend", "dtype", "device", "evaluation", "task", "metric")
"""Fields in which two rows agree that should have the same value."""


def add_run(file: Path, folder: Path) -> Path:
    """Check a run and copy it with its samples into ``folder``; returns the copy.

    A run that the folder contains already, or that repeats one with the same scores, is not copied.

    Raises:
        QVLMError: the run fails a check, or contradicts one in the folder.
    """
    run = read_run(file)
    _check_provenance(run)
    _check_tasks(run)
    added = read_board([file], folder)
    if added.problems:
        raise QVLMError(f"{file}: {added.problems[0].message}")
    for note in (EDITED, INCOMPLETE, CALIBRATED, UNCOMPARED, LIMITED):
        if found := next((row for row in added.rows if note in row.notes), None):
            raise QVLMError(f"{file}: {found.task}: {note}; such a run cannot be added")
    return _same_run(run, file, folder) or _copy(run, folder)


def _check_provenance(run: Run) -> None:
    facts = run.parsed.qvlm
    if facts is None:
        raise QVLMError(f"{run.file} has no provenance: only runs of --model qvlm can be added")
    if missing := [name for name in NEEDED if not re.fullmatch(r"[0-9a-f]{64}", getattr(facts, name) or "")]:
        raise QVLMError(f"{run.file}: qvlm.{missing[0]} is not a SHA-256: an older version wrote it; run it again")
    if not run.is_intact:
        raise QVLMError(f"{run.file} was edited after the run: its seal does not match")
    if facts.method != "none" and facts.calibration and facts.calibration.documents_compared is None:
        raise QVLMError(f"{run.file} does not record whether calibration documents were evaluated")


def _check_tasks(run: Run) -> None:
    if run.problems:
        raise QVLMError(run.problems[0])
    for task, counts in run.parsed.counts.items():
        if task not in run.coverage:
            raise QVLMError(f"{run.file}: no samples of {task} in its folder; run lmms-eval with --log_samples")
        if counts.effective != counts.original:
            raise QVLMError(
                f"{run.file}: {task}: only {counts.effective} of {counts.original} documents were evaluated"
            )
        if run.parsed.qvlm and task not in run.parsed.qvlm.data:
            raise QVLMError(f"{run.file}: {task}: qvlm.data does not record the source of its documents")
        unknown = run.coverage[task].unknown_images
        if run.parsed.qvlm and unknown and not saw_all_images(run.parsed.qvlm.answers.get(task), counts.effective):
            raise QVLMError(
                f"{run.file}: {task}: the samples do not record the images of {unknown} documents, so it is unknown "
                "which documents are independent: an older version resumed the run; run it again"
            )


def _same_run(run: Run, file: Path, folder: Path) -> Path | None:
    """The run in ``folder`` that this one repeats."""
    files = sorted(folder.rglob(f"*{SUFFIX}")) if folder.is_dir() else []
    repeated = next((other for other in files if other.read_bytes() == file.read_bytes()), None)
    if repeated or not files:
        return repeated
    board = read_board([*files, file], folder)
    evaluated = with_evaluations(board.rows)
    own = {_key(row): row for row in evaluated if row.run == run.hash[:16]}
    for row in evaluated:
        mine = own.get(_key(row))
        if mine is None or row.run == mine.run:
            continue
        if row.value != mine.value:
            raise QVLMError(
                f"{file}: {row.task} {row.metric} is {mine.value:.6g}, but {row.file} in {folder} has {row.value:.6g} "
                "for the same model, plan and documents; remove one of them"
            )
        repeated = folder / row.file
    return repeated


def _key(row: Row) -> tuple:
    return tuple(getattr(row, name) for name in SAME)


def _copy(run: Run, folder: Path) -> Path:
    facts = run.parsed.qvlm
    parts = (Path(facts.pretrained or "model").name, f"{facts.method}-{facts.scheme}", run.hash[:12])
    target = folder.joinpath(*(re.sub(r"[^A-Za-z0-9_.+-]", "_", part) for part in parts))
    for task in run.coverage:  # the results last: once they exist, so do their samples
        samples = samples_file(run.file, task)
        write_file(target / samples.name, samples.read_bytes())
    write_file(target / run.file.name, run.file.read_bytes())
    return target / run.file.name
