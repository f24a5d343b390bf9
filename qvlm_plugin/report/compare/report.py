"""The comparison as a report."""

from collections.abc import Sequence

from qvlm_plugin.report.compare.comparison import Compared, OverSeeds, pool_seeds
from qvlm_plugin.report.compare.grid import FULL_PRECISION, PREVIOUS, CompareGrid
from qvlm_plugin.report.estimates import difference_text, estimate_text
from qvlm_plugin.report.figures import Bars, bars_figure
from qvlm_plugin.report.paired_table import flips_text, total_note, unknown_note
from qvlm_plugin.report.pooled import spread_text, verdict
from qvlm_plugin.report.results import Grid, size
from qvlm_plugin.report.shares import FEWEST, PERCENT, unit_text
from qvlm_plugin.report.significance import p_text
from qvlm_plugin.report.writing import STAND_IN, Report

HEADER = (
    "model", "method", "scheme", "seed", "task", "score", "difference (points)", "p", "p (Holm)", "test", "flips",
    "bits", "packed size", "peak memory", "tokens/s", "search (s)",
)  # fmt: skip
SEEDS_HEADER = (
    "model", "method", "scheme", "task", "seeds", "score", "spread", "difference (points)", "p (t)", "p (t, Holm)",
    "p (sign flip)", "same sign", "flips",
)  # fmt: skip

BASELINES = {"none": "full precision", PREVIOUS: "the row above"}
"""Names of baselines that are not methods."""


def compare_report(grid: CompareGrid, compared: Sequence[Compared], problems: Sequence[str], command: str) -> Report:
    """Tables, rows, figure and verdicts of a comparison.

    Args:
        grid: the grid.
        compared: one or more cells.
        problems: lines about missing cells.
        command: the command line that reproduces the report.
    """
    pooled = pool_seeds(grid, compared)
    baseline = BASELINES.get(grid.baseline, grid.baseline)
    over_seeds = [Grid(SEEDS_HEADER, tuple(map(_seeds_cells, pooled)))] if len(grid.seeds) > 1 else []
    return Report(
        name=grid.name,
        title=grid.title or f"Comparison with {baseline}",
        command=command,
        tables=[Grid(HEADER, tuple(map(_cells, compared))), *over_seeds],
        rows=[cell.row() for cell in compared],
        notes=[*_notes(grid, compared, baseline), *(f"Missing: {line}" for line in problems)],
        figure=bars_figure(_bars(grid, compared, pooled)),
        verdicts=_verdicts(grid, pooled),
        data={"over_seeds": [row.row() for row in pooled]},
    )


def _notes(grid: CompareGrid, compared: Sequence[Compared], baseline: str) -> list[str]:
    tested = sum(cell.p is not None for cell in compared)
    stand_in = any(cell.parsed.qvlm and cell.parsed.qvlm.stand_in for cell in compared)
    limit = "all documents" if grid.limit is None else f"the first {grid.limit} documents"
    backends = sorted({cell.parsed.qvlm.backend or "?" for cell in compared if cell.parsed.qvlm})
    unit = unit_text(min((cell.scale for cell in compared), default=PERCENT))
    same = "" if grid.baseline == "none" else " with the same scheme and seed"
    stored = [name for name in grid.methods if grid.is_stored(name)]
    notes = [
        *([STAND_IN] if stand_in else []),
        f"{grid.metric} {unit} ± standard error, or with Wilson's 95 % interval if fewer than {FEWEST} documents "
        f"are right or wrong, on {limit} of each task. Difference: from {baseline}{same} on the "
        "same documents, with its 95 % interval. Standard errors and intervals are clustered by image if documents "
        "share images.",
        "Tests: McNemar's exact test for scores of 0 and 1 (if documents share images, its extension to clusters by "
        f"sign flips), Student's paired t for soft scores. Holm's adjustment covers all {tested} rows with a test.",
        "Flips: documents right→wrong / wrong→right (for soft scores lower / higher) / answered differently.",
        "Bits: effective bits of decoder weights, scales included / bits of decoder activations. Arithmetic: "
        f"{', '.join(backends)}"
        + (" (simulated: memory and speed of quantized runs are left out)." if "reference" in backends else "."),
        *([f"Already quantized, compared in their checkpoints' schemes: {', '.join(stored)}."] if stored else []),
        "Packed size: quantized weights in their formats, scales included, and everything else in 16 bits.",
    ]
    unknown = {cell.grid_cell.task: cell.comparison for cell in compared if cell.comparison and cell.comparison.unknown}
    notes += [f"{task}: {unknown_note(row.unknown, row.documents)}." for task, row in unknown.items()]
    totals = dict.fromkeys(cell.grid_cell.task for cell in compared if cell.comparison and cell.comparison.total)
    notes += [f"{total_note(task, grid.metric)}." for task in totals]
    if len(grid.seeds) > 1:
        notes += [
            "The second table pools the seeds of the calibration draw. Spread: standard deviation of the scores over "
            "seeds (lowest to highest). Standard errors, intervals and p (t) treat documents and seeds as random; "
            "p (sign flip) treats documents as random and these draws as fixed. Holm's adjustment covers all rows of "
            "this table with a test. Same sign: seeds whose difference has the sign of the mean. Flips are summed over "
            "the seeds.",
        ]
    return notes


def _cells(compared: Compared) -> tuple[str, ...]:
    row, facts, speed = compared.comparison, compared.parsed.qvlm, compared.parsed.tokens_per_second
    decoder = facts.bits.get("decoder", {}) if facts else {}
    return (
        compared.grid_cell.model,
        compared.grid_cell.method,
        compared.scheme,
        "" if compared.grid_cell.seed is None else str(compared.grid_cell.seed),
        compared.grid_cell.task,
        estimate_text(compared.score, compared.scale),
        difference_text(row.difference, row.scale) if row else "",
        "" if compared.p is None else p_text(compared.p, row.unknown),
        "" if compared.adjusted is None else p_text(compared.adjusted, row.unknown),
        compared.test,
        flips_text(row.flips) if row else "",
        f"{decoder['weight']:.2f} / {decoder['activation']:.0f}" if decoder else "",
        size(facts.packed_bytes if facts else None),
        "" if facts and facts.simulated else size(facts.peak_memory_bytes if facts else None),
        "" if speed is None else f"{speed:.1f}",
        f"{facts.search_seconds:.0f}" if facts and facts.calibration and facts.search_seconds is not None else "",
    )


def _seeds_cells(one: OverSeeds) -> tuple[str, ...]:
    row = one.pooled
    of = (one.model, one.method, one.scheme, one.task)
    head = (*of, str(row.seeds), estimate_text(row.score, row.scale), spread_text(row))
    if one.baseline is None:
        return (*head, *("" for _ in SEEDS_HEADER[len(head) :]))
    adjusted = "" if one.adjusted is None else p_text(one.adjusted, row.unknown)
    return (
        *head,
        difference_text(row.difference, row.scale),
        p_text(row.t_p, row.unknown),
        adjusted,
        p_text(row.sign_flip_p, row.unknown),
        f"{row.agreeing} of {row.seeds}",
        flips_text(row.flips),
    )


def _verdicts(grid: CompareGrid, pooled: Sequence[OverSeeds]) -> list[str]:
    """One sentence for each method, on the tasks' average if there are several."""
    last = {(row.model, row.method, row.scheme): row for row in pooled if row.baseline is not None}
    found = []
    for row in last.values():
        name = row.method if len(grid.schemes) == 1 else f"{row.method} {row.scheme}"
        where = f"{row.model}: " if len(grid.models) > 1 else ""
        found.append(where + verdict(row.pooled, name, BASELINES.get(row.baseline, row.baseline)))
    return found


def _bars(grid: CompareGrid, compared: Sequence[Compared], pooled: Sequence[OverSeeds]) -> list[Bars]:
    """The methods of each model, averaged over seeds; full precision as a vertical line."""
    groups = []
    for model in dict.fromkeys(row.model for row in pooled):
        own = {(row.method, row.scheme, row.task): row.pooled.shown for row in pooled if row.model == model}
        plain = {task: own[*FULL_PRECISION, task] for task in grid.tasks if (*FULL_PRECISION, task) in own}
        runs = list(dict.fromkeys((method, scheme) for method, scheme, _ in own))
        runs = [run for run in runs if run != FULL_PRECISION] or runs
        groups.append(
            Bars(
                title=model,
                rows=tuple(" ".join(run) for run in runs),
                accuracies={task: [own.get((*run, task)) for run in runs] for task in grid.tasks},
                lines={task: value for task, (value, *_) in plain.items()},
                line=BASELINES["none"],
                costs=[_cost(compared, (model, *run)) for run in runs],
            )
        )
    return groups


def _cost(compared: Sequence[Compared], run: tuple[str, str, str]) -> float | None:
    """Seconds of the search, from the method's first run that records them."""
    own = [cell.parsed.qvlm for cell in compared if (cell.grid_cell.model, cell.grid_cell.method, cell.scheme) == run]
    seconds = [facts.search_seconds for facts in own if facts and facts.calibration]
    return next((value for value in seconds if value is not None), None)
