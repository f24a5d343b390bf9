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
    finished, past = finished_cells([one.cell for one in runs], setting.output), finished_runs(setting.output)
    left = [one for one in runs if one.cell.name not in finished]
    memory = _memory(grid, setting, left)
    lines, times, plans = [], [], set()
    for one in runs:
        if one.cell.name in finished:
            lines.append(f"{one.cell.name}: finished: {finished[one.cell.name]}")
        else:
            time = estimate(one.cell, one.seed is not None and _plan(one) not in plans, past)
            costs = f"{_time_text(time)}, {_memory_text(memory[_kind(one)])}"
            lines.append(f"{one.cell.name}: {costs}: {' '.join(command(one.cell, setting))}")
            times.append(time)
        plans.add(_plan(one))
    lines += ["", f"{len(runs)} runs, {len(finished)} of them finished"]
    return lines + (_time_lines(times, setting.jobs) + _memory_lines(list(memory.values())) if left else [])


def _plan(one: GridCell) -> tuple:
    return *_kind(one), one.seed


def _kind(one: GridCell) -> tuple[str, str, str]:
    return one.model, one.method, one.scheme


def _time_text(time: Estimate) -> str:
    if time.evaluation is None:
        return "time unknown"
    return f"about {duration(time.evaluation + (time.search or 0))}" + " and a search" * (time.search is None)


def _time_lines(times: Sequence[Estimate], jobs: int) -> list[str]:
    known = sum((one.evaluation or 0) + (one.search or 0) for one in times) / jobs
    partly = any(None in (one.evaluation, one.search) for one in times)
    text = f"about {duration(known)}" + " plus unknown parts" * partly if known else "unknown"
    lines = [f"time: {text}" + (f", {jobs} runs at a time" if known and jobs > 1 else "")]
    for basis, count in Counter(one.basis for one in times).items():
        source = f"from finished {basis}" if basis else "unknown, no run of the same model on its task is finished"
        lines.append(f"- evaluation of {count} runs: {source}")
    if unknown := sum(one.search is None for one in times):
        lines.append(f"- {unknown} searches: unknown, no run of the same model, method and scheme is finished")
    if found := sum(bool(one.search) for one in times):
        lines.append(f"- {found} searches: from finished runs of the same method; cached plans take no time")
    return lines


def _memory(grid: CompareGrid, setting: Setting, runs: Sequence[GridCell]) -> dict[tuple, Memory | str]:
    """The runs' memory by model, method and scheme; an error's text if it cannot be computed."""
    found: dict[tuple, Memory | str] = {}
    skeleton = cache(lambda **opening: open_skeleton(opening))
    for one in runs:
        if _kind(one) not in found:
            arguments = one.cell.model_args
            try:
                with working_in(setting.directory):
                    model = skeleton(**opening_of(arguments))
                    found[_kind(one)] = run_memory(model, arguments, grid.request(one.method, one.scheme))
            except QVLMError as error:
                found[_kind(one)] = str(error)
    return found


def _memory_text(memory: Memory | str) -> str:
    if isinstance(memory, str):
        return "memory unknown"
    search = f"{memory.search / 1e9:.1f} GB to search and " if memory.search else ""
    return f"{search}{memory.evaluation / 1e9:.1f} GB to evaluate"


def _memory_lines(found: Sequence[Memory | str]) -> list[str]:
    known = [one for one in found if isinstance(one, Memory)]
    lines = [f"memory: {error}" for error in dict.fromkeys(one for one in found if isinstance(one, str))]
    if known:
        lines.append(f"memory: at most {max(max(one.search, one.evaluation) for one in known) / 1e9:.1f} GB a run")
        lines.append(
            f"- search: by the formula of docs/performance.md, for {TOKENS} tokens in the longest sample; "
            "evaluation: 1.2 times the weights; packages and data need more"
        )
    return lines
