"""The comparison as a report."""

from collections.abc import Sequence

from qvlm_plugin.report.compare.comparison import Compared
from qvlm_plugin.report.compare.grid import CompareGrid
from qvlm_plugin.report.figures import Bars, bars_figure
from qvlm_plugin.report.leaderboard.tables import size
from qvlm_plugin.report.paired import p_text
from qvlm_plugin.report.results import Grid
from qvlm_plugin.report.writing import STAND_IN, Report

HEADER = (
    "model", "method", "scheme", "task", "score", "drop (points)", "p", "p (Holm)", "test", "flips", "bits", "weights",
    "peak memory", "tokens/s", "search (s)",
)  # fmt: skip


def compare_report(grid: CompareGrid, compared: Sequence[Compared], trouble: Sequence[str], command: str) -> Report:
    """Table, rows and figure of a comparison.

    Args:
        grid: what was compared.
        compared: the cells, at least one.
        trouble: lines on cells that are missing.
        command: that makes it again.
    """
    tested = sum(one.p is not None for one in compared)
    stand_in = any(one.parsed.qvlm and one.parsed.qvlm.stand_in for one in compared)
    limit = "all documents" if grid.limit is None else f"the first {grid.limit} documents"
    backends = sorted({one.parsed.qvlm.backend or "?" for one in compared if one.parsed.qvlm})
    notes = [
        *([STAND_IN] if stand_in else []),
        f"{grid.metric} in percent ± standard error on {limit} of each task. Drop: points from full precision on the "
        "same documents, with its 95 % interval. Standard errors and intervals are clustered by image where several "
        "questions are about one.",
        "Tests: McNemar's exact test for scores of 0 and 1 (where documents share images, its extension to clusters by "
        f"sign flips), Student's paired t for soft scores. Holm's adjustment is over all {tested} rows with a test.",
        "Flips: documents right→wrong / wrong→right (for soft scores lower / higher) / answered differently.",
        "Bits: effective ones of a decoder weight, scales included / of a decoder activation. Arithmetic: "
        f"{', '.join(backends)}"
        + (" (simulated: its speed and memory are not those of low bits)." if "reference" in backends else "."),
        *(f"Missing: {line}" for line in trouble),
    ]
    return Report(
        name="comparison",
        title="Comparison with full precision",
        command=command,
        tables=[Grid(HEADER, tuple(_cells(one) for one in compared))],
        rows=[one.row() for one in compared],
        notes=notes,
        figure=bars_figure(_bars(grid, compared)),
    )


def _cells(one: Compared) -> tuple[str, ...]:
    row, facts = one.comparison, one.parsed.qvlm
    decoder = facts.bits.get("decoder", {}) if facts else {}
    return (
        one.arguments["pretrained"],
        one.arguments["method"],
        one.arguments["scheme"],
        one.task,
        f"{100 * one.score.value:.1f}" + (f" ± {100 * one.score.error:.1f}" if one.score.error >= 0 else ""),
        _drop(one),
        "" if one.p is None else p_text(one.p),
        "" if one.adjusted is None else p_text(one.adjusted),
        one.test,
        f"{row.flips.fell} / {row.flips.rose} / {row.flips.changed}" if row else "",
        f"{decoder['weight']:.2f} / {decoder['activation']:.0f}" if decoder else "",
        size(facts.weight_bytes if facts else None),
        size(facts.peak_memory_bytes if facts else None),
        "" if one.tokens_per_second is None else f"{one.tokens_per_second:.1f}",
        f"{facts.search_seconds:.0f}" if facts and facts.calibration and facts.search_seconds is not None else "",
    )


def _drop(one: Compared) -> str:
    if one.comparison is None:
        return ""
    difference = one.comparison.difference
    interval = f" [{100 * difference.low:+.2f}, {100 * difference.high:+.2f}]" if difference.error >= 0 else ""
    return f"{100 * difference.value:+.2f}{interval}"


def _bars(grid: CompareGrid, compared: Sequence[Compared]) -> list[Bars]:
    groups = []
    for model in dict.fromkeys(one.arguments["pretrained"] for one in compared):
        own = {(_name(one), one.task): one for one in compared if one.arguments["pretrained"] == model}
        plain = {task: one.score.value for (_, task), one in own.items() if one.comparison is None}
        names = tuple(dict.fromkeys(name for (name, _), one in own.items() if one.comparison is not None))
        if not names:  # nothing but full precision
            names = tuple(dict.fromkeys(name for name, _ in own))
        groups.append(
            Bars(
                title=model,
                rows=names,
                accuracies={task: [_point(own.get((name, task))) for name in names] for task in grid.tasks},
                lines={task: 100 * value for task, value in plain.items()},
                costs=[_cost([own[name, task] for task in grid.tasks if (name, task) in own]) for name in names],
            )
        )
    return groups


def _name(one: Compared) -> str:
    return f"{one.arguments['method']} {one.arguments['scheme']}"


def _point(one: Compared | None) -> tuple[float, float | None] | None:
    if one is None:
        return None
    return 100 * one.score.value, 100 * one.score.error if one.score.error >= 0 else None


def _cost(own: Sequence[Compared]) -> float | None:
    found = [one.parsed.qvlm.search_seconds for one in own if one.parsed.qvlm and one.parsed.qvlm.calibration]
    return next((seconds for seconds in found if seconds is not None), None)
