"""Figures 3a and 3b: accuracy and search cost of Q-VLM against the values of its options."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qvlm_plugin.report.ablations.evaluation import (
    Evaluated,
    Subject,
    accuracy,
    columns_of,
    evaluate,
    failures,
    notes_on,
)
from qvlm_plugin.report.figures import Panel, Series, panels_figure
from qvlm_plugin.report.results import Grid
from qvlm_plugin.report.runs import Setting
from qvlm_plugin.report.writing import Report


@dataclass(frozen=True)
class Sweep:
    """One option varied, the others as they are.

    Attributes:
        option: its name.
        values: as text.
        label: for the axis.
        log_x, integers: how the axis is drawn.
    """

    option: str
    values: tuple[str, ...]
    label: str
    log_x: bool = False
    integers: bool = False


def figure3a(
    subject: Subject, scheme: str, depths: Sequence[str], setting: Setting, command: str
) -> tuple[Report, list[Path]]:
    """Accuracy and search cost against ``max_depth``. Returns the report, and the logs of runs that failed."""
    sweep = Sweep("max_depth", tuple(depths), "max_depth (layers in a block)", integers=True)
    return _report("fig3a", "Figure 3a: maximum depth of a block", subject, scheme, [sweep], setting, command)


def figure3b(
    subject: Subject, scheme: str, percentiles: Sequence[str], etas: Sequence[str], setting: Setting, command: str
) -> tuple[Report, list[Path]]:
    """Accuracy and search cost against ``min_percentile`` and ``eta``. Returns as `figure3a` does."""
    sweeps = [
        Sweep("min_percentile", tuple(percentiles), "min_percentile (end of the grid)"),
        Sweep("eta", tuple(etas), "η", log_x=True),
    ]
    return _report("fig3b", "Figure 3b: percentiles and η", subject, scheme, sweeps, setting, command)


def _report(
    name: str, title: str, subject: Subject, scheme: str, sweeps: Sequence[Sweep], setting: Setting, command: str
) -> tuple[Report, list[Path]]:
    """Accuracy and search cost of Q-VLM against the values of options; one column of the figure for each option.

    Returns:
        The report, and the logs of runs that failed.
    """
    cells = {
        (sweep.option, value): subject.cell(f"{scheme}-{sweep.option}-{value}", scheme, **{sweep.option: value})
        for sweep in sweeps
        for value in sweep.values
    }
    found = dict(zip(cells, evaluate([*cells.values()], setting), strict=True))
    columns = columns_of(found.values())
    accuracies = [_accuracy_panel(sweep, found, columns) for sweep in sweeps]
    costs = [_cost_panel(sweep, found) for sweep in sweeps]
    report = Report(
        name=name,
        title=title,
        command=command,
        tables=[
            Grid(
                ("option", "value", "search cost (s)", *columns),
                tuple((*key, *one.texts(columns)) for key, one in found.items()),
            )
        ],
        rows=[{"option": key[0], "value": float(key[1]), "scheme": scheme, **one.row()} for key, one in found.items()],
        notes=[
            *notes_on(found.values()),
            f"`method=qvlm`, `scheme={scheme}`. Scores ± standard error, shares in percent.",
        ],
        figure=panels_figure([[*accuracies, *costs]] if len(sweeps) == 1 else [accuracies, costs]),
    )
    return report, failures(found.values())


def _accuracy_panel(sweep: Sweep, found: Mapping[tuple[str, str], Evaluated], columns: Sequence[str]) -> Panel:
    series = []
    for column in columns:
        points = {value: found[sweep.option, value].scores.get(column) for value in sweep.values}
        known = {float(value): accuracy(score) for value, score in points.items() if score is not None}
        y, errors = zip(*known.values(), strict=True) if known else ((), ())
        series.append(Series(column, tuple(known), y, errors))
    return Panel(sweep.label, "accuracy (%)", tuple(series), log_x=sweep.log_x, integers=sweep.integers)


def _cost_panel(sweep: Sweep, found: Mapping[tuple[str, str], Evaluated]) -> Panel:
    costs = {float(value): found[sweep.option, value].search_seconds for value in sweep.values}
    known = {value: cost for value, cost in costs.items() if cost is not None}
    series = (Series("search cost", tuple(known), tuple(known.values())),)
    return Panel(sweep.label, "search cost (s)", series, log_x=sweep.log_x, integers=sweep.integers)
