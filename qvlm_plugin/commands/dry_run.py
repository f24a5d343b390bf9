"""The output of ``qvlm compare --dry-run``: the runs of a grid, and their estimated time and memory."""

from collections import Counter
from collections.abc import Sequence
from functools import cache

from qvlm_plugin.commands.shared import working_in
from qvlm_plugin.doctor.needs import open_skeleton
from qvlm_plugin.doctor.run_memory import TOKENS, Memory, opening_of, run_memory
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.progress import duration
from qvlm_plugin.report.compare.estimate import Estimate, estimate, finished_runs
from qvlm_plugin.report.compare.grid import CompareGrid, GridCell, cells
from qvlm_plugin.report.runs import Setting, command, finished_cells


def dry_run_lines(grid: CompareGrid, setting: Setting) -> list[str]:
    """A line for each run with its results or its estimated costs, then the total and the basis of the estimates."""
    runs = cells(grid)
    finished, past = finished_cells([run.cell for run in runs], setting.output), finished_runs(setting.output)
    left = [run for run in runs if run.cell.name not in finished]
    memory = _memory(grid, setting, left)
    lines, times, plans = [], [], set()
    for run in runs:
        if run.cell.name in finished:
            lines.append(f"{run.cell.name}: finished: {finished[run.cell.name]}")
        else:
            time = estimate(run.cell, run.seed is not None and _plan(run) not in plans, past)
            costs = f"{_time_text(time)}, {_memory_text(memory[_kind(run)])}"
            lines.append(f"{run.cell.name}: {costs}: {' '.join(command(run.cell, setting))}")
            times.append(time)
        plans.add(_plan(run))
    lines += ["", f"{len(runs)} runs, {len(finished)} of them finished"]
    return lines + (_time_lines(times, setting.jobs) + _memory_lines(list(memory.values())) if left else [])


def _plan(run: GridCell) -> tuple:
    return *_kind(run), run.seed


def _kind(run: GridCell) -> tuple[str, str, str]:
    return run.model, run.method, run.scheme


def _time_text(time: Estimate) -> str:
    if time.evaluation is None:
        return "time unknown"
    return f"about {duration(time.evaluation + (time.search or 0))}" + " and a search" * (time.search is None)


def _time_lines(times: Sequence[Estimate], jobs: int) -> list[str]:
    known = sum((time.evaluation or 0) + (time.search or 0) for time in times) / jobs
    partly = any(None in (time.evaluation, time.search) for time in times)
    text = f"about {duration(known)}" + " plus unknown parts" * partly if known else "unknown"
    lines = [f"time: {text}" + (f", {jobs} runs at a time" if known and jobs > 1 else "")]
    for basis, count in Counter(time.basis for time in times).items():
        source = f"from finished {basis}" if basis else "unknown, no run of the same model on its task is finished"
        lines.append(f"- evaluation of {count} runs: {source}")
    if unknown := sum(time.search is None for time in times):
        lines.append(f"- {unknown} searches: unknown, no run of the same model, method and scheme is finished")
    if found := sum(bool(time.search) for time in times):
        lines.append(f"- {found} searches: from finished runs of the same method; cached plans take no time")
    return lines


def _memory(grid: CompareGrid, setting: Setting, runs: Sequence[GridCell]) -> dict[tuple, Memory | str]:
    """The runs' memory by model, method and scheme; an error's text if it cannot be computed."""
    found: dict[tuple, Memory | str] = {}
    skeleton = cache(lambda **opening: open_skeleton(opening))
    for run in runs:
        if _kind(run) not in found:
            arguments = run.cell.model_args
            try:
                with working_in(setting.directory):
                    model = skeleton(**opening_of(arguments))
                    found[_kind(run)] = run_memory(model, arguments, grid.request(run.method, run.scheme))
            except QVLMError as error:
                found[_kind(run)] = str(error)
    return found


def _memory_text(memory: Memory | str) -> str:
    if isinstance(memory, str):
        return "memory unknown"
    search = f"{memory.search / 1e9:.1f} GB to search and " if memory.search else ""
    return f"{search}{memory.evaluation / 1e9:.1f} GB to evaluate"


def _memory_lines(found: Sequence[Memory | str]) -> list[str]:
    known = [memory for memory in found if isinstance(memory, Memory)]
    lines = [f"memory: {error}" for error in dict.fromkeys(memory for memory in found if isinstance(memory, str))]
    if known:
        lines.append(
            f"memory: at most {max(max(memory.search, memory.evaluation) for memory in known) / 1e9:.1f} GB a run"
        )
        lines.append(
            f"- search: by the formula of docs/performance.md, for {TOKENS} tokens in the longest sample; "
            "evaluation: 1.2 times the weights; packages and data need more"
        )
    return lines
