"""Figure 2: discretization error difference against activation entropy, a point for each sample."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy.stats import pearsonr

from qvlm_plugin.calibration import CalibrationSet
from qvlm_plugin.models.loading import LoadedModel
from qvlm_plugin.plan_request import PlanRequest
from qvlm_plugin.report.ablations.difference import SamplePoint, sample_points
from qvlm_plugin.report.figures import Panel, Series, panels_figure
from qvlm_plugin.report.results import Grid
from qvlm_plugin.report.writing import Report, stand_in_note


@dataclass(frozen=True)
class Correlation:
    """Pearson's r with its 95 % interval and p-value; None if a variable is constant or there are too few points."""

    r: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None


def correlation(x: Sequence[float], y: Sequence[float]) -> Correlation:
    """Pearson's correlation of paired values."""
    if len(x) < 4 or len(set(x)) == 1 or len(set(y)) == 1:
        return Correlation()
    found = pearsonr(x, y)
    interval = found.confidence_interval(0.95)
    return Correlation(*(float(v) for v in (found.statistic, interval.low, interval.high, found.pvalue)))


def figure2(
    loaded: LoadedModel, request: PlanRequest, calibration: CalibrationSet, layer: int | None, command: str
) -> Report:
    """Discretization error difference against activation entropy, a point for each calibration sample.

    Args:
        loaded: the model in full precision.
        request: a request of ``method=qvlm``; its options are used for the search.
        calibration: the samples.
        layer: from 0; None takes the one below the middle (the paper: the 15th).
        command: the command line, for the report.
    """
    layer = loaded.model.config.text_config.num_hidden_layers // 2 - 1 if layer is None else layer
    points = sample_points(loaded, request.scheme, calibration, request.options, layer)
    found = {
        "activation entropy": correlation([p.entropy for p in points], [p.difference for p in points]),
        "dependency D(k, k+1)": correlation([p.dependency for p in points], [p.difference for p in points]),
    }
    differing = sum(point.difference > 0 for point in points)
    return Report(
        name="fig2",
        title=f"Figure 2: discretization error difference (DED) and activation entropy, decoder layer {layer}",
        command=command,
        tables=[_correlation_grid(found, len(points)), _points_grid(points)],
        rows=[
            {
                "sample": index,
                "entropy": point.entropy,
                "dependency": point.dependency,
                "sequential_error": point.sequential,
                "joint_error": point.joint,
                "ded": point.difference,
            }
            for index, point in enumerate(points)
        ],
        notes=[
            *stand_in_note(calibration),
            f"`scheme={request.scheme}`, {len(points)} samples of `{calibration.source}`, seed {calibration.seed}.",
            f"DED is the relative squared error of layer {layer + 1}'s output after the layer-wise search of layers "
            f"{layer} and {layer + 1} minus that after their joint search, separately for each sample. The searches "
            f"agree, and DED is 0, on {len(points) - differing} of {len(points)} samples.",
        ],
        figure=panels_figure([_scatters(points, found, layer)], height=3.2),
    )


def _scatters(points: Sequence[SamplePoint], found: Mapping[str, Correlation], layer: int) -> list[Panel]:
    y = [point.difference for point in points]
    x = {
        f"activation entropy of layer {layer} (nats)": [point.entropy for point in points],
        f"dependency D({layer}, {layer + 1}) (nats)": [point.dependency for point in points],
    }
    return [
        Panel(
            label,
            "DED (relative squared error)",
            (Series("samples", values, y),),
            joined=False,
            title="r undefined" if one.r is None else f"r = {one.r:.2f} [{one.low:.2f}, {one.high:.2f}]",
        )
        for (label, values), one in zip(x.items(), found.values(), strict=True)
    ]


def _correlation_grid(found: Mapping[str, Correlation], count: int) -> Grid:
    return Grid(
        ("DED against", "Pearson's r", "95 % interval", "p", "samples"),
        tuple(
            (name, *("undefined", "", ""), str(count))
            if one.r is None
            else (name, f"{one.r:.3f}", f"{one.low:.3f} to {one.high:.3f}", f"{one.p:.2g}", str(count))
            for name, one in found.items()
        ),
    )


def _points_grid(points: Sequence[SamplePoint]) -> Grid:
    header = ("sample", "entropy (nats)", "D(k, k+1) (nats)", "sequential error", "joint error", "DED")
    return Grid(
        header,
        tuple(
            (
                str(index),
                f"{point.entropy:.4f}",
                f"{point.dependency:.4f}",
                *(f"{value:.3e}" for value in (point.sequential, point.joint, point.difference)),
            )
            for index, point in enumerate(points)
        ),
    )
