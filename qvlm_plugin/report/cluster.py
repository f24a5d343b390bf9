"""Cells as jobs, through submitit: submitted, followed, and found again by who starts a grid anew."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.reading import one_line
from qvlm_plugin.report.runs import LOCKED, RUNNING, Cell, Outcome, Setting, command, find_results, lock_file, try_lock
from qvlm_plugin.report.slurm import NEVER, PROGRAMS, Queue, withdraw

EXECUTORS = ("local", "slurm")

QUEUED = "queued"
"""How the state of a cell begins whose job waits for its turn."""

_FOLDER = "jobs"
"""Folder of a cell's folder, for what submitit writes."""

_SCRIPT = "_submission.sh"
"""How the name of a job's batch script ends, after the job's number."""

# The job itself holds the cell's lock: another process that would run the cell waits, wherever it is.
_JOB = ["flock", "--no-fork", "{lock}", "bash", "-c", 'exec "$@" < /dev/null > "$0" 2>&1', "{log}"]


class JobRequest(BaseModel):
    """What the job of a cell asks for; the keys of ``cluster`` in the grid's file.

    Attributes:
        partition: of Slurm; None is Slurm's default, as of all else that is None.
        gpus: how many of one node.
        time: minutes until it is ended.
        memory: in GB.
        sbatch: further options of Slurm's ``sbatch``, by name; True is an option without a value, False none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    partition: str | None = None
    gpus: int = Field(0, ge=0)
    time: int = Field(24 * 60, ge=1)
    memory: float | None = Field(None, gt=0)
    sbatch: dict[str, str | int | bool] = Field(default_factory=dict)


class Jobs:
    """The cells of a grid as jobs.

    A job's function is submitit's own, which runs a command line: what submitit pickles is that list of texts, and
    nothing that it pickles is read here.
    """

    def __init__(self, executor: str, request: JobRequest, setting: Setting) -> None:
        """Check that jobs can be submitted.

        Args:
            executor: ``slurm``, or ``local`` for submitit's processes on this machine.
            request: what each job asks for; ``local`` looks at ``gpus`` and ``time`` alone.
            setting: where and how cells run.

        Raises:
            QVLMError: submitit is not installed, or this machine hands no jobs to Slurm.
        """
        try:
            import submitit  # noqa: F401
        except ImportError as error:
            raise QVLMError(f"{error}; --executor needs: pip install 'qvlm_plugin[cluster]'") from error
        missing = [program for program in PROGRAMS if shutil.which(program) is None]
        if executor == "slurm" and missing:
            raise QVLMError(
                f"--executor slurm: there is no {missing[0]} here; start it on a machine that submits to Slurm"
            )
        self._executor, self._request, self._setting = executor, request, setting
        self._queue = Queue()
        self._local: dict[str, Any] = {}
        self._searching: dict[tuple, str] = {}

    def steps(self, cell: Cell) -> Iterator[str | Outcome]:
        """Evaluate a cell by a job, unless results of it, or such a job, are there already.

        Yields:
            `QUEUED` with more, `RUNNING` or `LOCKED`, at once, as often as it is asked, and at last the outcome. The
            job goes on when this generator is closed.

        Raises:
            QVLMError: the cell's folder cannot be written, or Slurm refuses the job or will never start it.
        """
        folder = (self._setting.output / cell.name).resolve()
        with lock_file(folder) as lock:
            while (job := self._find(folder)) is None and not try_lock(lock):
                yield LOCKED
            if job is None:
                if found := find_results(cell, self._setting.output):
                    yield Outcome(cell, found, folder / "log.txt", reused=True)
                    return
                job = self._submit(cell, folder)
        self._searching.setdefault(_plan(cell), job)
        while (state := self._state(cell, job)) == RUNNING or state.startswith(QUEUED):
            yield state
        log, errors = folder / "log.txt", folder / _FOLDER / f"{job}_0_log.err"
        log = log if log.is_file() or not errors.is_file() else errors
        ended = f"job {job}{state and ': '}{state}"
        yield Outcome(cell, find_results(cell, self._setting.output), log, reused=False, job=ended)

    def withdraw(self, cell: Cell) -> None:
        """Take back a cell's job, unless it has started."""
        if job := self._find(self._setting.output / cell.name):
            withdraw(job)

    def _find(self, folder: Path) -> str | None:
        """The number of a job on Slurm that an earlier call submitted for the cell, and that has not ended."""
        scripts = (folder / _FOLDER).glob(f"[0-9]*{_SCRIPT}") if self._executor == "slurm" else ()
        numbers = (script.name.removesuffix(_SCRIPT) for script in scripts)
        return next((number for number in numbers if not self._queue.state(number).ended), None)

    def _submit(self, cell: Cell, folder: Path) -> str:
        from submitit import AutoExecutor
        from submitit.core.utils import FailedJobError, FailedSubmissionError
        from submitit.helpers import CommandFunction

        log = folder / "log.txt"
        log.unlink(missing_ok=True)
        around = [part.format(lock=folder / "lock", log=log) for part in _JOB]
        directory = self._setting.directory and self._setting.directory.resolve()
        function = CommandFunction([*around, *command(cell, self._setting)], cwd=directory)
        asked = self._request
        options = {"requeue": True, **self._after_search(cell), **asked.sbatch}
        executor = AutoExecutor(folder / _FOLDER, cluster=self._executor)
        executor.update_parameters(
            name=cell.name,
            timeout_min=asked.time,
            gpus_per_node=asked.gpus or None,
            mem_gb=asked.memory,
            slurm_partition=asked.partition,
            slurm_use_srun=False,  # a step that srun starts does not get all cores of the job
            slurm_additional_parameters={name: value for name, value in options.items() if value is not False},
        )
        try:
            job = executor.submit(function)
        except (FailedJobError, FailedSubmissionError) as error:
            raise QVLMError(f"Slurm refused the job of {cell.name}: {one_line(error)}") from error
        self._local[job.job_id] = job
        self._queue.add(job.job_id)
        return job.job_id

    def _after_search(self, cell: Cell) -> dict[str, str]:
        """Of cells of one plan the first searches it; the others shall not wait for that with a GPU in their hands."""
        first = self._searching.get(_plan(cell))
        if first is None or self._executor != "slurm" or "calibration" not in cell.model_args:
            return {}
        return {} if self._queue.state(first).ended else {"dependency": f"afterany:{first}"}

    def _state(self, cell: Cell, job: str) -> str:
        """`QUEUED` with more, or `RUNNING`; of a job that has ended how it ended, where that is known."""
        if self._executor == "local":
            return "" if self._local[job].done() else RUNNING
        state = self._queue.state(job)
        if state.waits and state.reason in NEVER:
            withdraw(job)
            raise QVLMError(f"Slurm will never start the job of {cell.name}, as it asks too much: {state.reason}")
        if state.waits:
            return f"{QUEUED} as job {job} ({state.reason})"
        return state.name.lower().replace("_", " ") if state.ended else RUNNING


def _plan(cell: Cell) -> tuple:
    """The same for cells of one plan."""
    return tuple(sorted(cell.model_args.items()))
