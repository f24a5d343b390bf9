"""Run the cells of a grid, several at a time, with a table of how they stand."""

import queue
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from rich.console import Console
from rich.live import Live
from rich.table import Table

from qvlm_plugin.report.results import read_results
from qvlm_plugin.report.runs import Cell, Outcome, Setting, finished_cells, log_end, run_cell

FRESH, RUNNING, DONE, FOUND, FAILED = "waiting", "running", "done", "finished before", "failed"


@dataclass
class Standing:
    """How the cells stand, by name; several threads write it, each its own cells."""

    cells: Sequence[Cell]
    metric: str
    states: dict[str, str] = field(default_factory=dict)
    scores: dict[str, str] = field(default_factory=dict)

    def set(self, outcome: Outcome) -> None:
        """Note how a cell ended."""
        name = outcome.cell.name
        if outcome.results is None:
            self.states[name] = FAILED
            return
        self.states[name] = FOUND if outcome.reused else DONE
        found = [score.value for score in read_results([outcome.results]) if score.metric == self.metric]
        self.scores[name] = f"{100 * found[0]:.1f}" if found else "–"

    def __rich__(self) -> Table:
        table = Table("cell", "state", self.metric)
        for cell in self.cells:
            table.add_row(cell.name, self.states.get(cell.name, FRESH), self.scores.get(cell.name, ""))
        return table


def run_grid(
    cells: Sequence[Cell], setting: Setting, metric: str, jobs: int, devices: Sequence[str], console: Console
) -> list[Outcome]:
    """Run all cells that are not finished; a failing one is told, and the others go on.

    Args:
        cells: those of one plan next to each other.
        setting: where and how.
        metric: shown of finished cells.
        jobs: cells at a time.
        devices: what each job's CUDA_VISIBLE_DEVICES says, taken in turns; empty leaves the environment alone.
        console: for the table.

    Returns:
        An outcome for each cell, in their order.
    """
    standing = Standing(cells, metric)
    finished = finished_cells(cells, setting.output)
    free: queue.Queue[str | None] = queue.Queue()
    for number in range(jobs):
        free.put(devices[number % len(devices)] if devices else None)
    printing = threading.Lock()

    def run(cell: Cell) -> Outcome:
        if results := finished.get(cell.name):
            outcome = Outcome(cell, results, setting.output / cell.name / "log.txt", reused=True)
        else:
            device = free.get()
            standing.states[cell.name] = RUNNING if device is None else f"{RUNNING} on {device}"
            try:
                environment = {} if device is None else {"CUDA_VISIBLE_DEVICES": device}
                outcome = run_cell(cell, setting, environment)
            finally:
                free.put(device)
        standing.set(outcome)
        if outcome.results is None:
            end = "\n".join(log_end(outcome.log))
            with printing:
                told = f"{cell.name} failed; the end of {outcome.log}:\n{end}"
                console.print(told, markup=False, highlight=False, soft_wrap=True)
        return outcome

    with Live(standing, console=console, refresh_per_second=2), ThreadPoolExecutor(jobs) as pool:
        try:
            return list(pool.map(run, cells))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
