"""Figures of a plan: what its search measured and chose."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.plan import RoundingPlan
from qvlm_plugin.report.ablations.layer_errors import LayerErrors
from qvlm_plugin.report.figures import Panel, Series, panels_figure

LOSSES = {
    "total": "L (nats)", "reg": "L_reg: answers (nats)", "ent": "L_ent: entropy (nats)",
    "err": "L_err: errors (relative)",
}  # fmt: skip


def search_figures(plan: RoundingPlan) -> dict[str, dict[str, bytes]]:
    """Figures of the plan's record: files by suffix, by the figure's name.

    ``search`` shows the dependency between layers with the blocks' borders, and the chosen percentiles. ``veo`` shows
    the losses of the visual encoder's training.

    Raises:
        QVLMError: the plan has no record of a search.
    """
    figures = {}
    if "cdm" in plan.record:
        figures["search"] = panels_figure([[_dependencies(plan)], [_percentiles(plan)]], height=2.4)
    if "veo" in plan.record:
        figures["veo"] = panels_figure(_losses(plan.record["veo"]))
    if not figures:
        raise QVLMError(
            f"this plan's method, {plan.method}, records no search; qvlm and qvlm_jacobian do, unless cdm and veo are "
            "both false"
        )
    return figures


def block_borders(plan: RoundingPlan) -> tuple[float, ...]:
    """Borders between blocks of decoder layers: halfway between the last layer of one and the first of the next."""
    blocks = plan.record.get("cdm", {}).get("blocks", [])
    return tuple(max(block["layers"]) + 0.5 for block in blocks[:-1])


def error_figure(plan: RoundingPlan, errors: Mapping[str, LayerErrors]) -> dict[str, bytes]:
    """Errors of each decoder layer's output, one series for each plan.

    Args:
        plan: the plan whose block borders are drawn.
        errors: errors by the name of the series.
    """
    kinds = {"whole": "whole sample", "token": "mean over tokens"}
    panels = [
        Panel(
            "decoder layer",
            "" if kind == "token" else "relative squared error",
            tuple(_error_series(name, getattr(one, kind)) for name, one in errors.items()),
            log_y=True,
            integers=True,
            title=title,
            borders=block_borders(plan),
        )
        for kind, title in kinds.items()
    ]
    return panels_figure([panels], height=3.0)


def _dependencies(plan: RoundingPlan) -> Panel:
    values = plan.record["cdm"]["dependencies"]
    middles = [index + 0.5 for index in range(len(values))]
    return Panel(
        "",
        "dependency D(k, k+1) (nats)",
        (Series("dependency", middles, values),),
        integers=True,
        title=f"{plan.method} {plan.scheme}: dependency of consecutive decoder layers; dashed: borders of blocks",
        borders=block_borders(plan),
        x_range=_layers(plan),
    )


def _layers(plan: RoundingPlan) -> tuple[float, float]:
    """The range of x, which aligns panels that stand above each other."""
    return -0.5, len(plan.record["cdm"]["dependencies"]) + 0.5


def _percentiles(plan: RoundingPlan) -> Panel:
    """A series for each kind of site, or a single one if all sites of a layer share their percentile."""
    chosen: dict[str, dict[int, float]] = {}
    for block in plan.record["cdm"]["blocks"]:
        for layer, sites in zip(block["layers"], block["percentiles"], strict=True):
            for name, value in sites.items():
                chosen.setdefault(name.partition(f".{layer}.")[2] or name, {})[layer] = value
    series = [Series(name, sorted(found), [found[layer] for layer in sorted(found)]) for name, found in chosen.items()]
    if all((line.x, line.y) == (series[0].x, series[0].y) for line in series):
        series = [Series("all sites", series[0].x, series[0].y)]
    return Panel(
        "decoder layer",
        "percentile",
        tuple(series),
        integers=True,
        title="chosen percentile of each layer",
        borders=block_borders(plan),
        x_range=_layers(plan),
    )


def _losses(record: Mapping[str, Any]) -> list[list[Panel]]:
    """An axis for each loss: losses differ by orders of magnitude, and each changes only a little."""
    curve = record["curve"]
    epochs = [row["epoch"] for row in curve]
    panels = [
        Panel("epoch", label, (Series(label, epochs, [row[name] for row in curve]),), integers=True)
        for name, label in LOSSES.items()
    ]
    before, after = (f"{record[when]['total']:.4g}" for when in ("before", "after"))
    total = replace(panels[0], title=f"L {before} before, {after} after")
    rest = replace(panels[1], title="means of each epoch's steps")
    return [[total, rest], panels[2:]]


def _error_series(name: str, values: Any) -> Series:
    """Mean and standard error over samples of a tensor [samples, layers]."""
    count, means = len(values), values.mean(dim=0).tolist()
    errors = (values.std(dim=0) / count**0.5).tolist() if count > 1 else None
    return Series(name, range(len(means)), means, errors)
