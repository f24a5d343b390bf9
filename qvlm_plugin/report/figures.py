"""Figures of a report: a few panels, legible at page width and in black and white."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import ScaledTranslation

WIDTH = 7.0
"""Inches: the text width of a page."""

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette, distinguishable under any kind of colour vision."""

MARKERS = "osD^vPX"

FEW = 12
"""Maximum number of points of a line that are drawn large and shifted apart from other lines' points."""

DODGE = 2.5
"""Points between series at the same x."""

STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.9",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.hashsalt": "qvlm",  # the same figure is the same file
}


@dataclass(frozen=True)
class Series:
    """A named series of points.

    Attributes:
        name: shown in the legend.
        x, y: coordinates, of equal length.
        errors: errors of y, drawn as bars; None draws none.
        labels: texts next to the points; None writes none.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    errors: Sequence[float | None] | None = None
    labels: Sequence[str] | None = None


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        x_label, y_label: labels with units.
        series: the series drawn.
        joined: whether a line joins the points of a series.
        log_y: whether the y axis is logarithmic.
        integers: whether x has integer ticks only.
        title: above the panel.
        borders: values of x marked by vertical lines.
        x_range: range of x; None fits the series.
    """

    x_label: str
    y_label: str
    series: tuple[Series, ...]
    joined: bool = True
    log_y: bool = False
    integers: bool = False
    title: str = ""
    borders: tuple[float, ...] = ()
    x_range: tuple[float, float] | None = None


@dataclass(frozen=True)
class Bars:
    """A table as aligned panels: accuracies with error bars and, if any is known, costs.

    Attributes:
        title: title of both panels.
        rows: names of the rows, top to bottom.
        accuracies: value and its 95 % interval of each row by task, shares in percent; None if missing.
        lines: reference value by task, drawn as a vertical line.
        line: name of the reference.
        costs: seconds of each row; None if unknown.
    """

    title: str
    rows: tuple[str, ...]
    accuracies: Mapping[str, Sequence[tuple[float, float, float] | None]]
    lines: Mapping[str, float]
    line: str
    costs: Sequence[float | None]


def panels_figure(rows: Sequence[Sequence[Panel]], height: float = 2.6) -> dict[str, bytes]:
    """Panels in rows; a legend names the series if a panel has several.

    Args:
        rows: rows with equal numbers of panels.
        height: height of a row in inches.

    Returns:
        The figure's files by suffix: ``png`` and ``svg``.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height * len(rows)), layout="constrained")
        grid = figure.subplots(len(rows), len(rows[0]), squeeze=False)
        for axes, panel in zip(grid.flat, (panel for row in rows for panel in row), strict=True):
            _draw_panel(axes, panel)
        _add_legend(figure, grid.flat)
        return _files(figure)


def bars_figure(groups: Sequence[Bars]) -> dict[str, bytes]:
    """Accuracies of each group and, if any group has costs, a second column with them; returns files by suffix."""
    widths = (2.4, 1) if any(cost is not None for group in groups for cost in group.costs) else (1,)
    with matplotlib.rc_context(STYLE):
        height = 0.75 + sum(0.75 + 0.32 * len(group.rows) for group in groups)
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        grid = figure.subplots(len(groups), len(widths), squeeze=False, width_ratios=widths, sharex="col")
        for (accuracy, *cost), group in zip(grid, groups, strict=True):
            _draw_accuracies(accuracy, group)
            for axes in cost:
                _draw_costs(axes, group)
        grid[-1][0].set_xlabel("score (shares in %), 95 % interval")
        for axes in grid[-1][1:]:
            axes.set_xlabel("search cost (s)")
            axes.set_xlim(left=0)  # the axis is shared
        _add_legend(figure, [axes for axes, *_ in grid], fewest=1)
        return _files(figure)


def _draw_panel(axes: Axes, panel: Panel) -> None:
    crowded = panel.joined and any(len(series.x) > FEW for series in panel.series)
    for index, series in enumerate(panel.series):
        style = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)], "label": series.name}
        style |= {"linestyle": "-" if panel.joined else ""}
        style |= {"linewidth": 0.9, "markersize": 2.5} if crowded else {"linewidth": 1.2, "markersize": 4, "capsize": 2}
        drawn = axes.errorbar(series.x, series.y, yerr=_bars(series.errors), **style)
        if not crowded:  # side by side, so that error bars at the same x do not overlap
            points = (index - (len(panel.series) - 1) / 2) * DODGE
            shift = ScaledTranslation(points / 72, 0, axes.figure.dpi_scale_trans)
            for artist in drawn.get_children():
                artist.set_transform(axes.transData + shift)
        for number, text in enumerate(series.labels or ()):  # above and below in turn, so that neighbours do not touch
            where, offset = (series.x[number], series.y[number]), (6, -9 if number % 2 else 3)
            axes.annotate(text, where, xytext=offset, textcoords="offset points", fontsize=8)
    for border in panel.borders:
        axes.axvline(border, color="0.4", linestyle=(0, (3, 2)), linewidth=0.8, zorder=0)
    axes.set(xlabel=panel.x_label, ylabel=panel.y_label, title=panel.title)
    if panel.x_range is not None:
        axes.set_xlim(panel.x_range)
    if panel.log_y:
        axes.set_yscale("log")
    if panel.integers:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _draw_accuracies(axes: Axes, group: Bars) -> None:
    count = len(group.accuracies)
    for index, (task, cells) in enumerate(group.accuracies.items()):
        colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
        offset = (index - (count - 1) / 2) * 0.22  # tasks of a row are drawn below each other
        known = [(row + offset, *cell) for row, cell in enumerate(cells) if cell is not None]
        if known:
            y, x, low, high = (np.array(values) for values in zip(*known, strict=True))
            style = {"color": colour, "marker": marker, "markersize": 4, "capsize": 2, "label": task}
            reach = np.maximum((x - low, high - x), 0)  # rounding may put the end of an interval beyond the value
            axes.errorbar(x, y, xerr=reach, linestyle="", **style)
        if task in group.lines:
            line = f"{group.line}, {task}" if count > 1 else group.line
            axes.axvline(group.lines[task], color=colour, linestyle=(0, (4, 2 + index)), linewidth=1, label=line)
    axes.set_title(group.title, loc="left")
    axes.set_yticks(range(len(group.rows)), group.rows)
    axes.set_ylim(len(group.rows) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)


def _draw_costs(axes: Axes, group: Bars) -> None:
    widths = [cost or 0.0 for cost in group.costs]
    bars = axes.barh(range(len(widths)), widths, height=0.55, color="0.6")
    texts = ["" if cost is None else f"{cost:.0f}" if cost >= 10 else f"{cost:.1f}" for cost in group.costs]
    axes.bar_label(bars, texts, padding=2, fontsize=8)
    axes.margins(x=0.3)
    axes.set_yticks([])
    axes.set_ylim(len(widths) - 0.5, -0.5)


def _bars(errors: Sequence[float | None] | None) -> list[float] | None:
    if errors is None or all(error is None for error in errors):
        return None
    return [0.0 if error is None else error for error in errors]


def _add_legend(figure: Figure, panels: Sequence[Axes], fewest: int = 2) -> None:
    """One legend above the panels, for those that have at least ``fewest`` series."""
    entries = {}
    for axes in panels:
        handles, names = axes.get_legend_handles_labels()
        if len(names) >= fewest:
            entries |= {name: entries.get(name, handle) for handle, name in zip(handles, names, strict=True)}
    if entries:
        figure.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=min(len(entries), 3))


def _files(figure: Figure) -> dict[str, bytes]:
    files = {}
    for suffix, options in (("png", {"dpi": 200}), ("svg", {"metadata": {"Date": None}})):
        buffer = BytesIO()
        figure.savefig(buffer, format=suffix, **options)
        files[suffix] = buffer.getvalue()
    return files
