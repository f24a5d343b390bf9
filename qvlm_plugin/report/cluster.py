"""Run cells as jobs through submitit: submit them, follow them, and find them again when a grid is restarted."""

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
"""Prefix of the state of a cell whose job is pending."""

_FOLDER = "jobs"
"""Subfolder of a cell's folder for submitit's files."""

_SCRIPT = "_submission.sh"
"""Suffix of a job's batch script; the prefix is the job's number."""

# The job itself takes the cell's lock, so that processes on other machines wait too.
_JOB = ["flock", "--no-fork", "{lock}", "bash", "-c", 'exec "$@" < /dev/null > "$0" 2>&1', "{log}"]


class JobRequest(BaseModel):
    """Resources of a cell's job; the keys of ``cluster`` in the grid's file.

    Attributes:
        partition: Slurm's partition. For all attributes, None is Slurm's default.
        gpus: number of GPUs, all on one node.
        time: time limit in minutes.
        memory: memory in GB.
        sbatch: further options of ``sbatch`` by name; True is an option without a value, False leaves it out.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    partition: str | None = None
    gpus: int = Field(0, ge=0)
    time: int = Field(24 * 60, ge=1)
    memory: float | None = Field(None, gt=0)
    sbatch: dict[str, str | int | bool] = Field(default_factory=dict)


class Jobs:
    """Runs the cells of a grid as jobs.

    Each job runs submitit's own function for a command line: submitit pickles only a list of strings, and this package
    reads no pickle.
    """

    def __init__(self, executor: str, request: JobRequest, setting: Setting) -> None:
        """Check that jobs can be submitted.

        Args:
            executor: ``slurm``, or ``local`` for submitit's processes on this machine.
            request: resources of each job; ``local`` uses only ``gpus`` and ``time``.
            setting: where and how to run cells.

        Raises:
            QVLMError: submitit is not installed, or this machine cannot submit to Slurm.
        """
        try:
            import submitit  # noqa: F401
        except ImportError as error:
            raise QVLMError(f"{error}; --executor needs: pip install 'qvlm_plugin[cluster]'") from error
        missing = [program for program in PROGRAMS if shutil.which(program) is None]
        if executor == "slurm" and missing:
            raise QVLMError(f"--executor slurm: {missing[0]} not found; run this on a machine that submits to Slurm")
        self._executor, self._request, self._setting = executor, request, setting
        self._queue = Queue()
        self._local: dict[str, Any] = {}
        self._searching: dict[tuple, str] = {}

    def steps(self, cell: Cell) -> Iterator[str | Outcome]:
        """Evaluate a cell as a job, unless its results or its job exist already.

        Yields:
            A state that begins with `QUEUED`, `RUNNING` or `LOCKED`, without blocking, until the job has ended; then
            the outcome. The job continues if this generator is closed.

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
        """Cancel a cell's job, unless it has started."""
        if job := self._find(self._setting.output / cell.name):
            withdraw(job)

    def _find(self, folder: Path) -> str | None:
        """The number of the Slurm job that an earlier call submitted for this cell, if it has not ended."""
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
        request = self._request
        options = {"requeue": True, **self._after_search(cell), **request.sbatch}
        executor = AutoExecutor(folder / _FOLDER, cluster=self._executor)
        executor.update_parameters(
            name=cell.name,
            timeout_min=request.time,
            gpus_per_node=request.gpus or None,
            mem_gb=request.memory,
            slurm_partition=request.partition,
            slurm_use_srun=False,  # a step started by srun does not get all cores of the job
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
        """Options that start a cell after the first cell of its plan, which searches it, so that no GPU idles."""
        first = self._searching.get(_plan(cell))
        if first is None or self._executor != "slurm" or "calibration" not in cell.model_args:
            return {}
        return {} if self._queue.state(first).ended else {"dependency": f"afterany:{first}"}

    def _state(self, cell: Cell, job: str) -> str:
        """A state that begins with `QUEUED`, or `RUNNING`; if the job has ended, how it ended, or an empty text."""
        if self._executor == "local":
            return "" if self._local[job].done() else RUNNING
        state = self._queue.state(job)
        if state.waits and state.reason in NEVER:
            withdraw(job)
            raise QVLMError(f"Slurm will never start the job of {cell.name}: it requests too much ({state.reason})")
        if state.waits:
            return f"{QUEUED} as job {job} ({state.reason})"
        return state.name.lower().replace("_", " ") if state.ended else RUNNING


def _plan(cell: Cell) -> tuple:
    """A key shared by the cells of one plan."""
    return tuple(sorted(cell.model_args.items()))
