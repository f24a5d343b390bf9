"""``qvlm ablate``: the paper's ablations."""

from collections.abc import Callable
from functools import wraps
from inspect import signature
from pathlib import Path
from typing import Annotated, Any

import typer

from qvlm_plugin.commands.compare import compare
from qvlm_plugin.commands.groups import CommandGroup
from qvlm_plugin.commands.shared import (
    Conv,
    Device,
    Dtype,
    ImageAspectRatio,
    MethodOptions,
    OneScheme,
    Pretrained,
    Revision,
    RouterNoiseSeed,
    Seed,
    Source,
    Topology,
    command_line,
    draw_from_task,
    needs_report_packages,
    obtain_plans,
    opened,
    pairs,
    working_in,
)

app = typer.Typer(
    cls=CommandGroup,
    help="The paper's ablations and this package's own, each with a table, its rows as JSON, and a figure.",
    no_args_is_help=True,
)

Output = Annotated[Path, typer.Argument(help="Folder of the report.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Samples per forward pass.")]
Data = Annotated[
    Path | None,
    typer.Option(help="Working directory: local copies of data sets and relative paths are looked up in it."),
]
HeldOut = Annotated[
    str | None,
    typer.Option(
        help="Samples to measure errors on, written as for --calibration; default: the same sources with another seed."
    ),
]
Depths = Annotated[str, typer.Option(help="Values of max_depth to compare, separated by commas.")]

_GRIDS = {
    "table1": "Table 1: gains from the joint search (CDM) and from training the encoder (VEO), alone and together.",
    "fig3a": "Figure 3a: accuracy and search cost for each maximum depth of a block.",
    "fig3b": "Figure 3b: accuracy and search cost for each smallest percentile of the search, and for each η.",
    "ladder": "From qlora to qvlm_rotated in eight steps, each compared with the one before.",
}


def _compare_on(grid: str) -> Callable[..., None]:
    """`compare` on a grid that is part of the package."""

    @wraps(compare)
    def command(**given: Any) -> None:
        compare(grid=Path(grid), **given)

    parameters = [parameter for parameter in signature(compare).parameters.values() if parameter.name != "grid"]
    command.__signature__ = signature(compare).replace(parameters=parameters)
    command.__doc__ = f"""{_GRIDS[grid]}

    Does the same as qvlm compare OUTPUT {grid}: the runs are listed in the grid file {grid}.yaml, which comes with this
    package. Options that you give replace the file's values.

    Example: qvlm ablate {grid} ablations --data demo-data --calibration calibration/train.json:64 --limit 200
    """
    return command


for _name in _GRIDS:
    app.command(_name)(_compare_on(_name))


@app.command("fig2")
def fig2(
    output: Output,
    pretrained: Pretrained = "demo",
    calibration: Source = "scienceqa:train:64",
    scheme: OneScheme = "w4a4",
    layer: Annotated[
        int | None,
        typer.Option(help="Index of the first of the two decoder layers, from 0; default: the one below the middle."),
    ] = None,
    option: MethodOptions = None,
    seed: Seed = 0,
    revision: Revision = None,
    conv: Conv = None,
    router_noise_seed: RouterNoiseSeed = None,
    image_aspect_ratio: ImageAspectRatio = None,
    topology: Topology = "described",
    dtype: Dtype = "auto",
    device: Device = None,
    data: Data = None,
) -> None:
    """Figure 2: for two decoder layers, plot the gain of a joint search against activation entropy, by sample.

    Example: qvlm ablate fig2 ablations --data demo-data --calibration calibration/train.json:64
    """
    with needs_report_packages():
        from qvlm_plugin.report.ablations.figure2 import figure2
    from qvlm_plugin.atomic import require_writable
    from qvlm_plugin.calibration import read_calibration
    from qvlm_plugin.models.loading import load_weights
    from qvlm_plugin.plan_request import check_request

    request = check_request("qvlm", scheme, pairs(option))
    require_writable(output / "report")
    with working_in(data):
        checkpoint = opened(
            pretrained, dtype, device, topology, revision=revision, conv=conv, router_noise_seed=router_noise_seed,
            image_aspect_ratio=image_aspect_ratio,
        )  # fmt: skip
        samples = read_calibration(calibration, None, seed, draw_from_task)
        loaded = load_weights(checkpoint, dtype=dtype, device=device)
        report = figure2(loaded, request, samples, layer, command_line())
    typer.echo(report.write(output))


@app.command("fig3c")
def fig3c(
    output: Output,
    pretrained: Pretrained = "demo",
    calibration: Source = "scienceqa:train:64",
    held_out: HeldOut = None,
    scheme: OneScheme = "w4a4",
    depths: Depths = "1,2,3,4,5",
    batch_size: BatchSize = 8,
    option: MethodOptions = None,
    seed: Seed = 0,
    revision: Revision = None,
    conv: Conv = None,
    router_noise_seed: RouterNoiseSeed = None,
    image_aspect_ratio: ImageAspectRatio = None,
    topology: Topology = "described",
    dtype: Dtype = "auto",
    device: Device = None,
    data: Data = None,
) -> None:
    """Figure 3c: plot each decoder layer's quantization error, for several maximum depths of a block; no evaluation.

    Uses cached plans if there are any, and leaves out samples that the plans were calibrated on.

    Example: qvlm ablate fig3c ablations --data demo-data --calibration calibration/train.json:64
    """
    with needs_report_packages():
        from qvlm_plugin.report.ablations.figure3c import figure3c
    from qvlm_plugin.atomic import require_writable
    from qvlm_plugin.calibration import read_calibration
    from qvlm_plugin.plan_request import check_request

    options = pairs(option)
    by_depth = [check_request("qvlm", scheme, options | {"max_depth": depth}) for depth in depths.split(",")]
    requests = {request.options.max_depth: request for request in by_depth}
    require_writable(output / "report")
    with working_in(data):
        checkpoint = opened(
            pretrained, dtype, device, topology, revision=revision, conv=conv, router_noise_seed=router_noise_seed,
            image_aspect_ratio=image_aspect_ratio,
        )  # fmt: skip
        others = read_calibration(held_out or calibration, None, seed + 1, draw_from_task)
        loaded, plans = obtain_plans(requests, calibration, None, seed, checkpoint, dtype=dtype, device=device)
        report = figure3c(loaded, plans, others, batch_size, command_line())
    typer.echo(report.write(output))


@app.command("sources")
def sources(
    output: Output,
    pretrained: Pretrained = "demo",
    calibration: Source = "scienceqa:train:64",
    held_out: HeldOut = None,
    methods: Annotated[
        str,
        typer.Option(
            help="Methods to compare, separated by commas; awq is not supported, because it rescales channels."
        ),
    ] = "qlora,qvlm_jacobian",
    scheme: OneScheme = "w4a4",
    batch_size: BatchSize = 8,
    seed: Seed = 0,
    revision: Revision = None,
    conv: Conv = None,
    router_noise_seed: RouterNoiseSeed = None,
    image_aspect_ratio: ImageAspectRatio = None,
    topology: Topology = "described",
    dtype: Dtype = "auto",
    device: Device = None,
    data: Data = None,
) -> None:
    """Plot where the error of rounded activations arises: layer, Linear and kind of token; no evaluation.

    Not a figure of the paper. Uses cached plans if there are any.

    Example: qvlm ablate sources ablations --data demo-data --calibration calibration/train.json:64
    """
    with needs_report_packages():
        from qvlm_plugin.report.ablations.sources import sources_report
    from qvlm_plugin.atomic import require_writable
    from qvlm_plugin.calibration import read_calibration
    from qvlm_plugin.plan_request import check_request

    requests = {method: check_request(method, scheme, {}) for method in methods.split(",")}
    require_writable(output / "report")
    with working_in(data):
        checkpoint = opened(
            pretrained, dtype, device, topology, revision=revision, conv=conv, router_noise_seed=router_noise_seed,
            image_aspect_ratio=image_aspect_ratio,
        )  # fmt: skip
        others = read_calibration(held_out or calibration, None, seed + 1, draw_from_task)
        loaded, plans = obtain_plans(requests, calibration, None, seed, checkpoint, dtype=dtype, device=device)
        report = sources_report(loaded, plans, others, batch_size, command_line())
    typer.echo(report.write(output))
