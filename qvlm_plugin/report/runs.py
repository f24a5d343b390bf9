"""Run the harness on a grid of configurations, one process each, and pick up where an earlier attempt stopped."""

import fcntl
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from qvlm_plugin.atomic import make_folder
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.reading import one_line, read_json
from qvlm_plugin.report.leaderboard.reading import samples_file

MODEL = "qvlm_llava"

LOG_LINES = 15
"""How much of a failed cell's log is shown."""


@dataclass(frozen=True)
class Cell:
    """One evaluation: a configuration of the model on some tasks.

    Attributes:
        name: of its folder.
        model_args: what ``--model_args`` says, as text.
        tasks: names of lmms-eval's tasks.
        limit: documents of each task; None evaluates all.
    """

    name: str
    model_args: Mapping[str, str]
    tasks: tuple[str, ...]
    limit: int | None = None


@dataclass(frozen=True)
class Setting:
    """Where and how cells run; it does not change what comes out.

    Attributes:
        output: folder that gets one folder for each cell. All it holds must come from one working directory, because
            relative names in ``model_args``, and local mirrors of data sets, mean something else in another.
        directory: the harness's working directory; None for the current one.
        batch_size: documents per forward pass.
        processes: processes that share a cell's documents.
        include_path: folder of tasks that lmms-eval does not know; None for no more.
    """

    output: Path
    directory: Path | None = None
    batch_size: int = 1
    processes: int = 1
    include_path: Path | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a cell.

    Attributes:
        cell: which.
        results: its results file; None when it failed.
        log: what the harness printed.
        reused: whether an earlier run's results were taken.
    """

    cell: Cell
    results: Path | None
    log: Path
    reused: bool


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
    """The newest results file anywhere below ``output`` that records this cell's arguments, tasks and limit.

    Beside it must be the samples of all documents: the harness writes them last, and may be killed before.
    """
    return finished_cells([cell], output).get(cell.name)


def finished_cells(cells: Sequence[Cell], output: Path) -> dict[str, Path]:
    """Of the cells that `find_results` would find, the results file by the cell's name; each file is read once."""
    left, found = list(cells), {}
    for file in sorted(output.rglob("*_results.json"), key=lambda file: file.stat().st_mtime, reverse=True):
        content = _read(file)
        for cell in [cell for cell in left if _is_of(cell, content) and _has_samples(file, content)]:
            found[cell.name] = file
            left.remove(cell)
    return found


def run_cell(cell: Cell, setting: Setting, environment: Mapping[str, str] | None = None) -> Outcome:
    """Evaluate a cell, unless a finished run of it is there already.

    lmms-eval exits with 0 even when an evaluation failed, so what counts is whether it wrote results.

    Args:
        cell: what to evaluate.
        setting: where and how.
        environment: variables that the harness sees beside this process's own.

    Raises:
        QVLMError: the cell's folder cannot be written.
    """
    log = setting.output / cell.name / "log.txt"
    with _only_one(log.parent) as lock:
        if found := find_results(cell, setting.output):
            return Outcome(cell, found, log, reused=True)
        with log.open("wb") as stream:
            subprocess.run(
                command(cell, setting),
                cwd=setting.directory,
                env={**os.environ, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                pass_fds=[lock],
            )
    return Outcome(cell, find_results(cell, setting.output), log, reused=False)


@contextmanager
def _only_one(folder: Path) -> Iterator[int]:
    """Wait until no other process runs the cell of this folder; gives the lock's file descriptor.

    Who inherits the descriptor holds the lock too: where this process is killed, the harness that it started goes on,
    and is waited for.
    """
    make_folder(folder)
    try:
        descriptor = os.open(folder / "lock", os.O_CREAT | os.O_RDWR)
    except OSError as error:
        raise QVLMError(f"{str(folder)!r} cannot be written: {one_line(error)}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def run_cells(cells: Sequence[Cell], setting: Setting) -> list[Outcome]:
    """Evaluate cells one after another, with progress on the terminal; a failed one does not stop the rest.

    Raises:
        QVLMError: the working directory is not there.
    """
    if setting.directory is not None and not setting.directory.is_dir():
        raise QVLMError(f"working directory {str(setting.directory)!r} does not exist")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    outcomes = []
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(cells))
        for cell in cells:
            progress.update(task, description=cell.name)
            outcome = run_cell(cell, setting)
            if outcome.reused:
                progress.console.print(f"{cell.name}: finished before, {outcome.results}", soft_wrap=True)
            elif outcome.results is None:
                end = "\n".join(log_end(outcome.log))
                told = f"{cell.name} failed; the end of {outcome.log}:\n{end}"
                progress.console.print(told, markup=False, highlight=False, soft_wrap=True)
            outcomes.append(outcome)
            progress.advance(task)
    return outcomes


def log_end(log: Path) -> list[str]:
    """The last lines of a log, without what progress bars have overwritten."""
    text = log.read_bytes().decode(errors="replace") if log.is_file() else ""
    lines = [line.rstrip().rsplit("\r", 1)[-1] for line in text.split("\n")]
    return [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in lines if line][-LOG_LINES:]


def _read(file: Path) -> Any:
    """The JSON of a results file; None when it is not whole."""
    try:
        return read_json(file)
    except (OSError, ValueError):
        return None


def _is_of(cell: Cell, content: Any) -> bool:
    try:
        config = content["config"]
        asked = config["resolved_cli_args"]
        return (
            bool(content["results"])
            and config["model"] == MODEL
            and _parse(config["model_args"]) == dict(cell.model_args)
            and set(str(asked["tasks"]).split(",")) == set(cell.tasks)
            and config["limit"] == cell.limit
        )
    except (KeyError, TypeError, AttributeError):
        return False  # not a results file


def _has_samples(file: Path, content: Any) -> bool:
    """Whether the samples beside a results file are those of all documents that it counts."""
    try:
        for task, counts in content["n-samples"].items():
            with samples_file(file, task).open("rb") as lines:
                if sum(line.endswith(b"\n") for line in lines) < counts["effective"]:
                    return False
    except (OSError, KeyError, TypeError, AttributeError, ValueError):
        return False
    return True


def _parse(model_args: Any) -> dict[str, str]:
    """The text of ``--model_args`` as names and values, whatever their order."""
    return {name: value for name, _, value in (pair.partition("=") for pair in model_args.split(","))}
