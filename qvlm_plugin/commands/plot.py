"""``qvlm plot``: figures of a plan."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qvlm_plugin.commands.shared import (
    Conv,
    Device,
    Dtype,
    ImageAspectRatio,
    Revision,
    RouterNoiseSeed,
    Topology,
    draw_from_task,
    needs_report_packages,
    opened,
    working_in,
)
from qvlm_plugin.errors import QVLMError

if TYPE_CHECKING:
    from qvlm_plugin.models.loading import Checkpoint
    from qvlm_plugin.plan import RoundingPlan


def plot(
    plan: Annotated[Path, typer.Argument(help="A plan's folder.")],
    output: Annotated[Path | None, typer.Option(help="Folder for the figures; default: the plan's folder.")] = None,
    pretrained: Annotated[
        str | None,
        typer.Option(
            help="The plan's checkpoint. If given, errors are measured, for which a layer-wise plan is searched."
        ),
    ] = None,
    held_out: Annotated[
        str | None,
        typer.Option(
            help="Samples to measure errors on, task:split:n or file.json:n; default: the plan's, with another seed."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples per forward pass.")] = 8,
    revision: Revision = None,
    conv: Conv = None,
    router_noise_seed: RouterNoiseSeed = None,
    image_aspect_ratio: ImageAspectRatio = None,
    topology: Topology = "described",
    dtype: Dtype = "auto",
    device: Device = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Working directory: local copies of data sets and relative paths are looked up in it."),
    ] = None,
) -> None:
    """Draw how a plan was searched: dependency of layers with block borders, chosen percentiles and VEO losses.

    With --pretrained, also draws the error of each layer, next to that of a layer-wise search (max_depth=1) with
    otherwise the same options.

    Example: qvlm plot plans/qvlm-w4a4 --pretrained demo --data demo-data
    """
    with needs_report_packages():
        from qvlm_plugin.report.plan_figures import search_figures
    from qvlm_plugin.atomic import require_writable, write_file
    from qvlm_plugin.plan import RoundingPlan

    loaded = RoundingPlan.load(plan)
    figures = search_figures(loaded)
    folder = output or plan
    require_writable(folder / "errors.png")
    if pretrained is not None:
        _check_blocks(loaded)
        with working_in(data):
            checkpoint = opened(
                pretrained, dtype, device, topology, revision=revision, conv=conv, router_noise_seed=router_noise_seed,
                image_aspect_ratio=image_aspect_ratio,
            )  # fmt: skip
            figures["errors"] = _errors(loaded, checkpoint, held_out, batch_size, {"dtype": dtype, "device": device})
    for name, files in figures.items():
        for suffix, blob in files.items():
            write_file(folder / f"{name}.{suffix}", blob)
        typer.echo(folder / f"{name}.png")


def _check_blocks(plan: "RoundingPlan") -> None:
    if "cdm" not in plan.record or plan.calibration is None:
        raise QVLMError("--pretrained needs a plan with a search of blocks (method=qvlm with cdm=true)")


def _errors(
    plan: "RoundingPlan", checkpoint: "Checkpoint", held_out: str | None, batch_size: int, placement: dict[str, str]
) -> dict[str, bytes]:
    from qvlm_plugin.cache import cache_root
    from qvlm_plugin.calibration import read_calibration
    from qvlm_plugin.models.loading import load_weights
    from qvlm_plugin.plan_request import check_request
    from qvlm_plugin.planning import obtain_plan
    from qvlm_plugin.report.ablations.layer_errors import layer_errors, unseen_samples
    from qvlm_plugin.report.plan_figures import error_figure

    depth = plan.options["max_depth"]
    request = check_request(plan.method, plan.scheme, dict(plan.options) | {"max_depth": 1})
    source, seed = plan.calibration.source, plan.calibration.seed
    samples = read_calibration(source, None, seed, draw_from_task)
    others = read_calibration(held_out or source, None, seed + 1, draw_from_task)
    model = load_weights(checkpoint, **placement)
    if model.fingerprint != plan.model:
        raise QVLMError(
            f"--{checkpoint.source}, with the options given, is not the plan's model; name the plan's checkpoint"
        )
    layer_wise = obtain_plan(model, request, samples, cache_root() / "plans")
    unseen = unseen_samples(unseen_samples(others, plan), layer_wise)
    plans = {"layer-wise (max_depth 1)": layer_wise, f"joint (max_depth {depth})": plan}
    return error_figure(
        plan, {name: layer_errors(model, searched, unseen, batch_size) for name, searched in plans.items()}
    )
