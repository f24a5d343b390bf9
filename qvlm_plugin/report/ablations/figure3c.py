"""Figure 3c: quantization error of each decoder layer, for different maximum depths of a block."""

from collections.abc import Mapping

from torch import Tensor

from qvlm_plugin.calibration import CalibrationSet
from qvlm_plugin.models.loading import LoadedModel
from qvlm_plugin.plan import RoundingPlan
from qvlm_plugin.report.ablations.layer_errors import layer_errors, unseen_samples
from qvlm_plugin.report.figures import Panel, Series, panels_figure
from qvlm_plugin.report.results import Grid
from qvlm_plugin.report.writing import Report, stand_in_note


def figure3c(
    loaded: LoadedModel, plans: Mapping[int, RoundingPlan], samples: CalibrationSet, batch_size: int, command: str
) -> Report:
    """Error of each decoder layer's output, for plans of different maximum depth.

    Args:
        loaded: the model in full precision.
        plans: plans by ``max_depth``; 1 is the layer-wise search.
        samples: samples that plans were calibrated on are left out.
        batch_size: samples per forward pass.
        command: the command line, for the report.
    """
    for plan in plans.values():
        samples = unseen_samples(samples, plan)
    errors = {depth: layer_errors(loaded, plan, samples, batch_size) for depth, plan in plans.items()}
    whole = {depth: found.whole for depth, found in errors.items()}
    token = {depth: found.token for depth, found in errors.items()}
    first, scheme = next((depth, plan.scheme) for depth, plan in plans.items())
    costs = ", ".join(f"{depth}: {plan.search_seconds:.1f} s" for depth, plan in plans.items())
    return Report(
        name="fig3c",
        title="Figure 3c: quantization error of each layer",
        command=command,
        tables=[_grid("whole sample", whole), _grid("mean over tokens", token)],
        rows=[
            {
                "max_depth": depth,
                "layer": layer,
                "error": error,
                "stderr": stderr,
                "token_error": token_error,
                "token_stderr": token_stderr,
                "plan_hash": plans[depth].hash,
                "search_seconds": plans[depth].search_seconds,
            }
            for depth in plans
            for layer, ((error, stderr), (token_error, token_stderr)) in enumerate(
                zip(_summary(whole[depth]), _summary(token[depth]), strict=True)
            )
        ],
        notes=[
            *stand_in_note(samples),
            f"`method=qvlm`, `scheme={scheme}`. Squared error of a decoder layer's output relative to full precision, "
            f"in the fully quantized model; mean ± standard error over {len(samples.samples)} samples of "
            f"`{samples.source}`, seed {samples.seed}, without those that the plans were calibrated on.",
            "Left: over a whole sample, where a few tokens with massive activations dominate. Right: mean over tokens "
            f"of each token's relative error. Below: mean of the samples' ratios to max_depth {first}.",
            f"Wall time of each plan's search, by max_depth: {costs}.",
        ],
        figure=panels_figure(
            [
                [
                    Panel(
                        "", "relative squared error", _series(whole), log_y=True, integers=True, title="whole sample"
                    ),
                    Panel("", "", _series(token), log_y=True, integers=True, title="mean over tokens"),
                ],
                [
                    Panel("decoder layer", f"ratio to max_depth {first}", _series(_ratios(whole)), integers=True),
                    Panel("decoder layer", "", _series(_ratios(token)), integers=True),
                ],
            ]
        ),
    )


def _ratios(values: Mapping[int, Tensor]) -> dict[int, Tensor]:
    # Sample by sample, because samples differ much more than depths do.
    first = next(iter(values.values()))
    return {depth: errors / first for depth, errors in values.items()}


def _summary(values: Tensor) -> list[tuple[float, float | None]]:
    """Mean and standard error over samples for each layer of [samples, layers]."""
    count, means = len(values), values.mean(dim=0).tolist()
    errors = (values.std(dim=0) / count**0.5).tolist() if count > 1 else [None] * len(means)
    return [*zip(means, errors, strict=True)]


def _series(values: Mapping[int, Tensor]) -> tuple[Series, ...]:
    series = []
    for depth, one in values.items():
        means, errors = zip(*_summary(one), strict=True)
        name = "max_depth 1 (layer-wise)" if depth == 1 else f"max_depth {depth}"
        series.append(Series(name, range(len(means)), means, errors))
    return tuple(series)


def _grid(name: str, values: Mapping[int, Tensor]) -> Grid:
    columns = [[_text(*cell) for cell in _summary(errors)] for errors in values.values()]
    header = (f"layer ({name})", *(f"max_depth={depth}" for depth in values))
    return Grid(header, tuple((str(layer), *cells) for layer, cells in enumerate(zip(*columns, strict=True))))


def _text(value: float, error: float | None) -> str:
    return f"{value:.3e}" if error is None else f"{value:.3e} ± {error:.1e}"
