"""Run many cells, several at a time, and show their progress."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Column, Table

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.progress import LINE_EVERY, duration
from qvlm_plugin.report.cluster import QUEUED, Jobs
from qvlm_plugin.report.results import read_results
from qvlm_plugin.report.runs import POLL, RUNNING, Cell, Outcome, Setting, finished_cells, log_end, steps
from qvlm_plugin.report.samples import read_samples

FRESH, DONE, FOUND, FAILED = "waiting", "done", "finished before", "failed"
INTERRUPTED, DETACHED, WITHDRAWN = "interrupted", "its job continues", "its job is cancelled"


@dataclass
class _Run:
    """A cell that has been started: its device, its state, and the time of its last change of state."""

    cell: Cell
    device: str | None
    steps: Iterator[str | Outcome]
    log: Path
    state: str = ""
    since: float = field(default_factory=time.monotonic)

    @classmethod
    def start(cls, cell: Cell, setting: Setting, device: str | None, jobs: Jobs | None) -> "_Run":
        environment = {} if device is None else {"CUDA_VISIBLE_DEVICES": device}
        progress = steps(cell, setting, environment) if jobs is None else jobs.steps(cell)
        return cls(cell, device, progress, setting.output / cell.name / "log.txt")

    def change(self, state: str) -> None:
        self.state, self.since = state, time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.since

    @property
    def queued(self) -> bool:
        return self.state.startswith(QUEUED)

    def __str__(self) -> str:
        """Its state, with the newest line of its log."""
        if self.state != RUNNING:
            return self.state
        device = "" if self.device is None else f" on {self.device}"
        newest = log_end(self.log)[-1:]
        return f"{RUNNING}{device}, {duration(self.seconds)}" + "".join(f": {line.strip()}" for line in newest)


@dataclass
class _Display:
    """Shows all cells: a line for each that has ended, and on a terminal a table of those that run."""

    cells: Sequence[Cell]
    metric: str
    console: Console
    runs: dict[str, _Run] = field(default_factory=dict)
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    printed: float = 0.0

    def shown(self) -> AbstractContextManager:
        """A context in which a terminal shows the table."""
        return Live(self, console=self.console, refresh_per_second=2) if self.console.is_terminal else nullcontext()

    def changed(self, run: _Run) -> None:
        """Report that a run began to wait or to run."""
        self.runs[run.cell.name] = run
        if not self.console.is_terminal:
            self._print(f"{run.cell.name}: {'started' if run.state == RUNNING else run.state}")

    def ended(self, outcome: Outcome) -> None:
        """Report that a cell ended."""
        name = outcome.cell.name
        run = self.runs.pop(name, None)
        self.outcomes[name] = outcome
        took = f" in {duration(run.seconds)}" if run and not outcome.reused else ""
        score = f", {self.metric} {self._score(outcome.results)}" if outcome.results else ""
        count = f"{len(self.outcomes)} of {len(self.cells)}"
        self._print(f"{name}: {_state(outcome)}{took}{score} ({count})")
        if outcome.results is None:
            self._print("\n".join([f"{name} failed; last lines of {outcome.log}:", *log_end(outcome.log)]))

    def heartbeat(self) -> None:
        """If the output is not a terminal, print the state of running cells from time to time."""
        if not self.console.is_terminal and self.runs and time.monotonic() - self.printed >= LINE_EVERY:
            for name, run in self.runs.items():
                if not run.queued:
                    self._print(f"{name}: {run}")
            if queued := sum(run.queued for run in self.runs.values()):
                self._print(f"{queued} jobs are {QUEUED}")

    def _print(self, text: str) -> None:
        self.printed = time.monotonic()
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _score(self, results: Path) -> str:
        """The score of each task, with the task's name if there are several."""
        found = [score for score in read_results([results]) if score.metric == self.metric]
        texts = [f"{score.task} " * (len(found) > 1) + score.text for score in found]
        return ", ".join(texts) or "–"

    def __rich__(self) -> Table:
        table = Table("cell", Column("state", no_wrap=True, overflow="ellipsis"))
        runs = {**self.runs}
        for name, run in runs.items():
            table.add_row(name, str(run))
        if left := len(self.cells) - len(self.outcomes) - len(runs):
            table.add_row(f"{left} more", FRESH)
        return table


def run_cells(
    cells: Sequence[Cell],
    setting: Setting,
    metric: str = "exact_match",
    console: Console | None = None,
    jobs: Jobs | None = None,
) -> list[Outcome]:
    """Run all cells that are not finished.

    After a cell failed, no other is started; running cells are waited for and the failure is raised, unless the setting
    says to keep going. An interrupt stops the cells that run as processes; jobs continue.

    Args:
        cells: the cells, those of one plan next to each other.
        setting: where and how to run them.
        metric: the metric shown for finished cells, which all of them must have unless the setting says to keep going.
        console: where to show progress; None for standard error.
        jobs: runs each cell as a job of a cluster; None runs cells as child processes.

    Returns:
        An outcome for each cell, in their order.

    Raises:
        QVLMError: a cell failed or has no scores of the metric, its folder cannot be written, its job is refused, or
            the working directory does not exist.
    """
    if setting.directory is not None and not setting.directory.is_dir():
        raise QVLMError(f"working directory {str(setting.directory)!r} does not exist")
    display = _Display(cells, metric, console or Console(stderr=True))
    finished = finished_cells(cells, setting.output)
    waiting = deque(cell for cell in cells if cell.name not in finished)
    free = deque(
        setting.devices[job % len(setting.devices)] if setting.devices else None for job in range(setting.jobs)
    )
    running: list[_Run] = []
    failed: list[Outcome] = []
    with display.shown():
        for cell in cells:
            if results := finished.get(cell.name):
                display.ended(Outcome(cell, results, setting.output / cell.name / "log.txt", reused=True))
                _check_metric(results, metric, setting)
        try:
            while running or (waiting and (setting.keep_going or not failed)):
                while waiting and free and (setting.keep_going or not failed):
                    running.append(_Run.start(waiting.popleft(), setting, free.popleft(), jobs))
                for run in [*running]:
                    step = next(run.steps)
                    if isinstance(step, Outcome):
                        running.remove(run)
                        free.append(run.device)
                        display.ended(step)
                        if step.results is None:
                            failed.append(step)
                        else:
                            _check_metric(step.results, metric, setting)
                    elif failed and not setting.keep_going and step.startswith(QUEUED):
                        run.steps.close()
                        jobs.withdraw(run.cell)
                        running.remove(run)
                        waiting.append(run.cell)
                        run.change(WITHDRAWN)
                        display.changed(run)
                    elif step != run.state:
                        run.change(step)
                        display.changed(run)
                display.heartbeat()
                if running:
                    time.sleep(POLL)
        except KeyboardInterrupt:
            for run in running:
                run.change(INTERRUPTED if jobs is None else DETACHED)
                display.changed(run)
            raise
        finally:
            for run in running:
                run.steps.close()
    if failed and not setting.keep_going:
        rest = f" ({len(waiting)} runs were not started; --keep-going starts them)" if waiting else ""
        raise QVLMError(f"{failed[0].failure}{rest}")
    return [display.outcomes[cell.name] for cell in cells]


def _check_metric(results: Path, metric: str, setting: Setting) -> None:
    """Stop before more cells run if the documents of a finished one have no scores to compare."""
    if setting.keep_going or any(score.metric == metric for score in read_results([results])):
        return
    for run in read_samples(results):
        if metric not in run.metrics:
            known = ", ".join(run.metrics) or "none"
            raise QVLMError(f"--metric {metric}: {results} has no such metric; it has {known}")


def _state(outcome: Outcome) -> str:
    if outcome.results is None:
        return FAILED
    return FOUND if outcome.reused else DONE
