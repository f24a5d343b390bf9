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
    SUFFIX,
    UNCOMPARED,
    Run,
    read_board,
    read_run,
    samples_file,
)
from qvlm_plugin.report.leaderboard.row import Row
from qvlm_plugin.report.samples import saw_all_images

NEEDED = ("plan_hash", "table_hash", "model_fingerprint", "seal")
SAME = ("model_fingerprint", "plan_hash", "backend", "dtype", "device", "evaluation", "task", "metric")
"""What two rows that should have the same value have in common."""


def add_run(file: Path, folder: Path) -> Path:
    """Check a run and copy it with its samples into ``folder``; returns the copy.

    A run that is there already, or repeats one with the same scores, is not copied again.

    Raises:
        QVLMError: the run may not be added, or contradicts one that is there; the message says why.
    """
    run = read_run(file)
    _check_provenance(run)
    _check_tasks(run)
    added = read_board([file], folder)
    if added.problems:
        raise QVLMError(f"{file}: {added.problems[0].message}")
    for note in (EDITED, INCOMPLETE, CALIBRATED, UNCOMPARED, LIMITED):
        if found := next((row for row in added.rows if note in row.notes), None):
            raise QVLMError(f"{file}: {found.task}: {note}; only whole and clean runs may be added")
    if there := _same_run(run, file, folder):
        return there
    return _copy(run, folder)


def _check_provenance(run: Run) -> None:
    facts = run.parsed.qvlm
    if facts is None:
        raise QVLMError(f"{run.file} has no provenance: only runs of --model qvlm can be added")
    if missing := [name for name in NEEDED if not re.fullmatch(r"[0-9a-f]{64}", getattr(facts, name) or "")]:
        raise QVLMError(f"{run.file}: qvlm.{missing[0]} is no SHA-256: an older version wrote it; run it again")
    if not run.is_intact:
        raise QVLMError(f"{run.file} was edited after the run: its seal does not fit")
    if facts.method != "none" and facts.calibration and facts.calibration.documents_compared is None:
        raise QVLMError(f"{run.file} does not tell whether calibration documents were evaluated")


def _check_tasks(run: Run) -> None:
    if run.problems:
        raise QVLMError(run.problems[0])
    for task, counts in run.parsed.counts.items():
        if task not in run.coverage:
            raise QVLMError(f"{run.file}: {task} has no samples beside it: run lmms-eval with --log_samples")
        if counts.effective != counts.original:
            raise QVLMError(f"{run.file}: {task}: {counts.effective} of {counts.original} documents were evaluated")
        if run.parsed.qvlm and task not in run.parsed.qvlm.data:
            raise QVLMError(f"{run.file}: {task}: qvlm.data does not tell where its documents came from")
        untold = run.coverage[task].untold
        if run.parsed.qvlm and untold and not saw_all_images(run.parsed.qvlm.answers.get(task), counts.effective):
            raise QVLMError(
                f"{run.file}: {task}: of {untold} documents the samples do not tell the images, so that nobody knows "
                "which are independent: an older version resumed the run; run it again"
            )


def _same_run(run: Run, file: Path, folder: Path) -> Path | None:
    """The run in ``folder`` that this one repeats."""
    files = sorted(folder.rglob(f"*{SUFFIX}")) if folder.is_dir() else []
    there = next((other for other in files if other.read_bytes() == file.read_bytes()), None)
    if there or not files:
        return there
    board = read_board([*files, file], folder)
    evaluated = with_evaluations(board.rows)
    own = {_key(row): row for row in evaluated if row.run == run.hash[:16]}
    for row in evaluated:
        mine = own.get(_key(row))
        if mine is None or row.run == mine.run:
            continue
        if row.value != mine.value:
            raise QVLMError(
                f"{file}: {row.task} {row.metric} is {mine.value:.6g}, but {row.file} there has {row.value:.6g} for "
                "the same model, plan and documents; remove one of them"
            )
        there = folder / row.file
    return there


def _key(row: Row) -> tuple:
    return tuple(getattr(row, name) for name in SAME)


def _copy(run: Run, folder: Path) -> Path:
    facts = run.parsed.qvlm
    parts = (Path(facts.pretrained or "model").name, f"{facts.method}-{facts.scheme}", run.hash[:12])
    target = folder.joinpath(*(re.sub(r"[^A-Za-z0-9_.+-]", "_", part) for part in parts))
    for task in run.coverage:  # the results last: when they are there, so are their samples
        samples = samples_file(run.file, task)
        write_file(target / samples.name, samples.read_bytes())
    write_file(target / run.file.name, run.file.read_bytes())
    return target / run.file.name
