"""Run the harness on one configuration in a separate process, unless its results exist already."""

import fcntl
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qvlm_plugin.atomic import make_folder
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.reading import one_line, read_json
from qvlm_plugin.report.leaderboard.schema import SUFFIX, samples_file

MODEL = "qvlm_llava"

RUNNING, LOCKED = "running", "waiting for another process that runs it"
"""States of a cell that has not ended."""

POLL = 0.1
"""Seconds between two polls of a process."""

LOG_LINES = 15
"""Lines of a failed cell's log that are shown."""

_TAIL = 65_536
"""Bytes at the end of a log that are searched for its newest lines."""

_GRACE = 10
"""Seconds between SIGTERM and SIGKILL."""

_ERROR = re.compile(
    r"^Traceback \(most recent call last\):\n(?:[ \t].*\n)*(?P<raised>\S.*)"
    r"|^(?P<printed>(?:\w+\.)*\w*Error: .+)"
    r"|^[\d-]+ [\d:.]+ \| ERROR +\| \S+ - (?P<logged>.+)",
    re.MULTILINE,
)
_RANK = re.compile(r"^\[rank\d+\]: ?")
_COLOURS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


@dataclass(frozen=True)
class Cell:
    """One evaluation: a configuration of the model on some tasks.

    Attributes:
        name: name of its folder.
        model_args: the harness's ``--model_args``, as texts.
        tasks: names of lmms-eval's tasks.
        limit: documents of each task; None for all.
    """

    name: str
    model_args: Mapping[str, str]
    tasks: tuple[str, ...]
    limit: int | None = None


@dataclass(frozen=True)
class Setting:
    """Where and how cells run; it does not affect their results.

    Attributes:
        output: folder that gets one folder for each cell. Use one working directory for all its content: relative
            names in ``model_args`` and local mirrors of data sets depend on it.
        directory: the harness's working directory; None for the current one.
        batch_size: documents per forward pass.
        processes: number of processes that share a cell's documents.
        include_path: folder of additional tasks; None for none.
        jobs: number of cells that run at a time.
        devices: values of CUDA_VISIBLE_DEVICES, assigned to jobs in turn; empty leaves the environment unchanged.
        keep_going: whether to run the remaining cells after one failed.
    """

    output: Path
    directory: Path | None = None
    batch_size: int = 1
    processes: int = 1
    include_path: Path | None = None
    jobs: int = 1
    devices: tuple[str, ...] = ()
    keep_going: bool = False


@dataclass(frozen=True)
class Outcome:
    """How a cell ended.

    Attributes:
        cell: the cell.
        results: its results file; None if it failed.
        log: file with the harness's output.
        reused: whether the results are an earlier run's.
        status: the harness's exit status; None if it was not started by this process.
        job: its job on a cluster, and how that ended; empty without a job.
    """

    cell: Cell
    results: Path | None
    log: Path
    reused: bool
    status: int | None = None
    job: str = ""

    @property
    def failure(self) -> str:
        """Why a cell has no results: the last error in its log, and the log's path."""
        killed = f"killed by signal {-self.status}" if self.status is not None and self.status < 0 else ""
        ended = f" ({killed or self.job})" if killed or self.job else ""
        error = last_error(self.log) or "its log is empty"
        return f"{self.cell.name} ended without results{ended}: {error}; log: {self.log}"


def command(cell: Cell, setting: Setting) -> list[str]:
    """The command line that evaluates a cell."""
    launcher = [sys.executable, "-m"]
    if setting.processes > 1:
        launcher += ["torch.distributed.run", "--standalone", "--nproc_per_node", str(setting.processes), "-m"]
    limit = [] if cell.limit is None else ["--limit", str(cell.limit)]
    more_tasks = [] if setting.include_path is None else ["--include_path", str(setting.include_path.resolve())]
    return [
        *(*launcher, "lmms_eval", "--model", MODEL),
        *("--model_args", ",".join(f"{name}={value}" for name, value in cell.model_args.items())),
        *("--tasks", ",".join(cell.tasks), "--batch_size", str(setting.batch_size), *limit, *more_tasks),
        *("--log_samples", "--output_path", str((setting.output / cell.name).resolve())),
    ]


def find_results(cell: Cell, output: Path) -> Path | None:
    """The newest results file below ``output`` with this cell's arguments, tasks and limit.

    The samples of all documents must be in the same folder: the harness writes them last.
    """
    return finished_cells([cell], output).get(cell.name)


def finished_cells(cells: Sequence[Cell], output: Path) -> dict[str, Path]:
    """The files that `find_results` finds for several cells, by the cell's name; each file is read once."""
    left, found = list(cells), {}
    for file in sorted(output.rglob(f"*{SUFFIX}"), key=lambda file: file.stat().st_mtime, reverse=True):
        content = _read(file)
        for cell in [cell for cell in left if _matches(cell, content) and _has_samples(file, content)]:
            found[cell.name] = file
            left.remove(cell)
    return found


def run_cell(cell: Cell, setting: Setting, environment: Mapping[str, str] | None = None) -> Outcome:
    """Evaluate a cell and wait until it has ended; arguments and errors are those of `steps`."""
    with closing(steps(cell, setting, environment)) as progress:
        while not isinstance(step := next(progress), Outcome):
            time.sleep(POLL)
    return step


def steps(cell: Cell, setting: Setting, environment: Mapping[str, str] | None = None) -> Iterator[str | Outcome]:
    """Evaluate a cell, unless a finished run of it exists already.

    lmms-eval exits with 0 even if an evaluation failed, so a cell succeeded if it wrote results.

    Args:
        cell: what to evaluate.
        setting: where and how to run it.
        environment: variables added to this process's environment for the harness.

    Yields:
        `RUNNING` or `LOCKED`, without blocking, until the cell has ended; then the outcome. Closing the generator
        stops the harness.

    Raises:
        QVLMError: the cell's folder cannot be written.
    """
    log = setting.output / cell.name / "log.txt"
    with lock_file(log.parent) as lock:
        while not try_lock(lock):
            yield LOCKED
        if found := find_results(cell, setting.output):
            yield Outcome(cell, found, log, reused=True)
            return
        with log.open("wb") as stream:
            process = subprocess.Popen(
                command(cell, setting),
                cwd=setting.directory,
                env={**os.environ, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                pass_fds=[lock],
            )
        try:
            while process.poll() is None:
                yield RUNNING
        finally:
            _end(process)
    yield Outcome(cell, find_results(cell, setting.output), log, reused=False, status=process.returncode)


def _end(process: subprocess.Popen) -> None:
    """Stop a process that still runs."""
    process.terminate()
    try:
        process.wait(_GRACE)
    finally:
        process.kill()
        process.wait()


@contextmanager
def lock_file(folder: Path) -> Iterator[int]:
    """The descriptor of a lock file that lets one process at a time run the cell of this folder.

    Child processes inherit the descriptor and with it the lock: if this process is killed, its harness continues and
    others wait for it.
    """
    make_folder(folder)
    try:
        descriptor = os.open(folder / "lock", os.O_CREAT | os.O_RDWR)
    except OSError as error:
        raise QVLMError(f"{str(folder)!r} cannot be written: {one_line(error)}") from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def try_lock(descriptor: int) -> bool:
    """Take the lock of `lock_file`; False if another process has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def log_end(log: Path) -> list[str]:
    """The last lines of a log, progress bars in their last state."""
    return _lines(log, _TAIL)[-LOG_LINES:]


def last_error(log: Path) -> str:
    """The line of a log that explains a failure.

    This is the last line that ends a traceback, is printed as an error, or is logged as an error by loguru. If loguru's
    line repeats the exception before it, the exception is returned. Without such a line it is the log's last line; for
    an empty log, an empty text.
    """
    lines = [_RANK.sub("", line) for line in _lines(log)]
    exception, error = "", lines[-1] if lines else ""
    for found in _ERROR.finditer("\n".join(lines)):
        if logged := found["logged"]:
            _, _, message = exception.partition(": ")
            error = exception if message and message in logged else logged
        else:
            exception = error = found["raised"] or found["printed"]
    return error


def _lines(log: Path, size: int | None = None) -> list[str]:
    """The non-empty lines in the last ``size`` bytes of a log, as a terminal would show them."""
    if not log.is_file():
        return []
    with log.open("rb") as stream:
        if size is not None:
            stream.seek(max(0, log.stat().st_size - size))
        text = _COLOURS.sub("", stream.read().decode(errors="replace"))
    lines = (line.rstrip().rsplit("\r", 1)[-1] for line in text.split("\n"))
    return [line for line in lines if line]


def _read(file: Path) -> Any:
    """The JSON of a results file; None if it is incomplete."""
    try:
        return read_json(file)
    except (OSError, ValueError):
        return None


def _matches(cell: Cell, content: Any) -> bool:
    try:
        config = content["config"]
        arguments = config["resolved_cli_args"]
        return (
            bool(content["results"])
            and config["model"] == MODEL
            and _parse(config["model_args"]) == dict(cell.model_args)
            and set(str(arguments["tasks"]).split(",")) == set(cell.tasks)
            and config["limit"] == cell.limit
        )
    except (KeyError, TypeError, AttributeError):
        return False  # not a results file


def _has_samples(file: Path, content: Any) -> bool:
    """Whether the samples of all documents that a results file counts are in its folder."""
    try:
        for task, counts in content["n-samples"].items():
            with samples_file(file, task).open("rb") as lines:
                if sum(line.endswith(b"\n") for line in lines) < counts["effective"]:
                    return False
    except (OSError, KeyError, TypeError, AttributeError, ValueError):
        return False
    return True


def _parse(model_args: Any) -> dict[str, str]:
    """Parse the text of ``--model_args``."""
    return {name: value for name, _, value in (pair.partition("=") for pair in model_args.split(","))}
