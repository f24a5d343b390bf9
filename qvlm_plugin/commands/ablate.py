"""``qvlm ablate``: the paper's ablations."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qvlm_plugin.commands.shared import (
    Conv,
    Device,
    Dtype,
    ImageAspectRatio,
    KeepGoing,
    MethodOptions,
    OneScheme,
    Pretrained,
    Revision,
    RouterNoiseSeed,
    Seed,
    Source,
    command_line,
    draw_from_task,
    needs_report_packages,
    obtain_plans,
    opened,
    pairs,
    working_in,
)
from qvlm_plugin.demo import resolve_demo
from qvlm_plugin.errors import QVLMError

if TYPE_CHECKING:
    from qvlm_plugin.report.ablations.evaluation import Subject
    from qvlm_plugin.report.writing import Report

app = typer.Typer(help="The paper's ablations: for each a table, its rows and a figure.", no_args_is_help=True)

Output = Annotated[Path, typer.Argument(help="Folder of the reports, and of the runs they rest on.")]
Tasks = Annotated[str, typer.Option(help="Tasks of lmms-eval, separated by commas.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Documents of each task; default: all.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Documents or samples per forward pass.")]
Processes = Annotated[int, typer.Option(min=1, help="Processes that share the documents of a run.")]
ModelArgs = Annotated[str, typer.Option(help="Further model arguments of every run, for example dtype=float16,seed=1.")]
Data = Annotated[
    Path | None,
    typer.Option(help="Working directory: local mirrors of data sets, and relative names, are looked up there."),
]
HeldOut = Annotated[
    str | None,
    typer.Option(help="Samples to measure on, named like --calibration; default: its sources, drawn again."),
]
Depths = Annotated[str, typer.Option(help="Values of max_depth, separated by commas.")]

TASKS = "scienceqa,vizwiz_vqa_val,vqav2_val"


@app.command("table1")
def table1(
    output: Output,
    pretrained: Pretrained = "demo",
    calibration: Source = "scienceqa:train:64",
    schemes: Annotated[str, typer.Option(help="Bits, separated by commas.")] = "w6a6,w4a4",
    tasks: Tasks = TASKS,
    limit: Limit = None,
    batch_size: BatchSize = 8,
    processes: Processes = 1,
    option: MethodOptions = None,
    model_args: ModelArgs = "",
    data: Data = None,
    keep_going: KeepGoing = False,
) -> None:
    """Weight memory, search cost and accuracy of the baseline, +CDM, +VEO and Q-VLM.

    Every row is a run of lmms-eval; one that is finished, for any ablation in this folder, is not run again.

    Example: qvlm ablate table1 ablations --data demo-data --calibration calibration/train.json:64 --limit 1000
    """
    with needs_report_packages():
        from qvlm_plugin.report.ablations.table1 import table1
    from qvlm_plugin.models.loading import load
    from qvlm_plugin.report.runs import Setting

    subject = _subject(pretrained, calibration, tasks, limit, option, model_args)
    more = subject.model_args
    with working_in(data):
        placement = {"revision": more.get("revision"), "dtype": more.get("dtype", "auto"), "device_map": "meta"}
        shapes = load(resolve_demo(pretrained), **placement)
    setting = Setting(output / "runs", data, batch_size, processes, keep_going=keep_going)
    _finish(output, *table1(subject, schemes.split(","), setting, shapes, command_line()))


@app.command("fig3a")
def fig3a(
    output: Output,
    pretrained: Pretrained = "demo",
    calibration: Source = "scienceqa:train:64",
    scheme: OneScheme = "w4a4",
    depths: Depths = "1,2,3,4,5",
    tasks: Tasks = TASKS,
    limit: Limit = None,
    batch_size: BatchSize = 8,
    processes: Processes = 1,
    option: MethodOptions = None,
    model_args: ModelArgs = "",
    data: Data = None,
    keep_going: KeepGoing = False,
) -> None:
    """Accuracy and search cost against the maximum depth of a block.

    Every point is a run of lmms-eval; one that is finished, for any ablation in this folder, is not run again. The
    cost of a search grows exponentially with the depth.

    Example: qvlm ablate fig3a ablations --data demo-data --calibration calibration/train.json:64 --limit 1000
    """
    with needs_report_packages():
        from qvlm_plugin.report.ablations.sweeps import figure3a
    from qvlm_plugin.report.runs import Setting

    subject = _subject(pretrained, calibration, tasks, limit, option, model_args)
    setting = Setting(output / "runs", data, batch_size, processes, keep_going=keep_going)
    _finish(output, *figure3a(subject, scheme, depths.split(","), setting, command_line()))


@app.command("fig3b")
def fig3b(
    output: Output,
    pretrained: Pretrained = "demo",
    calibration: Source = "scienceqa:train:64",
    scheme: OneScheme = "w4a4",
    percentiles: Annotated[
        str, typer.Option(help="Values of min_percentile, the end of the grid, separated by commas.")
    ] = "1,0.995,0.99,0.985,0.98",
    etas: Annotated[str, typer.Option(help="Values of η above 0, separated by commas.")] = "0.1,0.3,1,3,10",
    tasks: Tasks = TASKS,
    limit: Limit = None,
    batch_size: BatchSize = 8,
    processes: Processes = 1,
    option: MethodOptions = None,
    model_args: ModelArgs = "",
    data: Data = None,
    keep_going: KeepGoing = False,
) -> None:
    """Accuracy and search cost against the end of the percentile grid, and against η.

    Every point is a run of lmms-eval; one that is finished, for any ablation in this folder, is not run again.

    Example: qvlm ablate fig3b ablations --data demo-data --calibration calibration/train.json:64 --limit 1000
    """
    with needs_report_packages():
        from qvlm_plugin.report.ablations.sweeps import figure3b
    from qvlm_plugin.report.runs import Setting

    subject = _subject(pretrained, calibration, tasks, limit, option, model_args)
    setting = Setting(output / "runs", data, batch_size, processes, keep_going=keep_going)
    command = command_line()
    _finish(output, *figure3b(subject, scheme, percentiles.split(","), etas.split(","), setting, command))


@app.command("ladder")
def ladder(
    output: Output,
    pretrained: Pretrained = "demo",
    calibration: Source = "scienceqa:train:64",
    schemes: Annotated[str, typer.Option(help="Bits, separated by commas.")] = "w4a4,w4a3,w3a3",
    seeds: Annotated[str, typer.Option(help="Seeds of the calibration samples, separated by commas.")] = "0,1,2",
    tasks: Tasks = TASKS,
    limit: Limit = None,
    batch_size: BatchSize = 8,
    processes: Processes = 1,
    model_args: ModelArgs = "",
    data: Data = None,
    keep_going: KeepGoing = False,
) -> None:
    """From qlora to qvlm_rotated, one choice after the other, each against the one before; not in the paper.

    Every rung, scheme and seed is a run of lmms-eval; one that is finished in this folder is not run again.

    Example: qvlm ablate ladder ablations --data demo-data --calibration calibration/train.json:64 --limit 1000
    """
    with needs_report_packages():
        from qvlm_plugin.report.ablations.ladder import ladder
    from qvlm_plugin.report.runs import Setting

    subject = _subject(pretrained, calibration, tasks, limit, None, model_args)
    setting = Setting(output / "runs", data, batch_size, processes, keep_going=keep_going)
    _finish(output, *ladder(subject, schemes.split(","), _seeds(seeds), setting, command_line()))


@app.command("fig2")
def fig2(
    output: Output,
    pretrained: Pretrained = "demo",
    calibration: Source = "scienceqa:train:64",
    scheme: OneScheme = "w4a4",
    layer: Annotated[
        int | None, typer.Option(help="Decoder layer, from 0, searched with the next one; default: below the middle.")
    ] = None,
    option: MethodOptions = None,
    seed: Seed = 0,
    revision: Revision = None,
    conv: Conv = None,
    router_noise_seed: RouterNoiseSeed = None,
    image_aspect_ratio: ImageAspectRatio = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    data: Data = None,
) -> None:
    """Discretization error difference of two layers against activation entropy, a point for each calibration sample.

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
            pretrained, dtype, device, revision=revision, conv=conv, router_noise_seed=router_noise_seed,
            image_aspect_ratio=image_aspect_ratio,
        )  # fmt: skip
        samples = read_calibration(calibration, None, seed, draw_from_task)
        loaded = load_weights(checkpoint, dtype=dtype, device=device)
        report = figure2(loaded, request, samples, layer, command_line())
    _finish(output, report)


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
    dtype: Dtype = "auto",
    device: Device = "cpu",
    data: Data = None,
) -> None:
    """Quantization error of each decoder layer, for plans of different maximum depth; no evaluation is run.

    Plans are taken from the cache where they are there. Samples that they were fitted on are left out.

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
            pretrained, dtype, device, revision=revision, conv=conv, router_noise_seed=router_noise_seed,
            image_aspect_ratio=image_aspect_ratio,
        )  # fmt: skip
        others = read_calibration(held_out or calibration, None, seed + 1, draw_from_task)
        loaded, plans = obtain_plans(requests, calibration, None, seed, checkpoint, dtype=dtype, device=device)
        report = figure3c(loaded, plans, others, batch_size, command_line())
    _finish(output, report)


@app.command("sources")
def sources(
    output: Output,
    pretrained: Pretrained = "demo",
    calibration: Source = "scienceqa:train:64",
    held_out: HeldOut = None,
    methods: Annotated[
        str, typer.Option(help="Methods to compare, separated by commas; not awq, which moves scales.")
    ] = "qlora,qvlm_jacobian",
    scheme: OneScheme = "w4a4",
    batch_size: BatchSize = 8,
    seed: Seed = 0,
    revision: Revision = None,
    conv: Conv = None,
    router_noise_seed: RouterNoiseSeed = None,
    image_aspect_ratio: ImageAspectRatio = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    data: Data = None,
) -> None:
    """Where the error of rounded activations enters: by layer, Linear and kind of token; no evaluation is run.

    Not a figure of the paper. Plans are taken from the cache where they are there.

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
            pretrained, dtype, device, revision=revision, conv=conv, router_noise_seed=router_noise_seed,
            image_aspect_ratio=image_aspect_ratio,
        )  # fmt: skip
        others = read_calibration(held_out or calibration, None, seed + 1, draw_from_task)
        loaded, plans = obtain_plans(requests, calibration, None, seed, checkpoint, dtype=dtype, device=device)
        report = sources_report(loaded, plans, others, batch_size, command_line())
    _finish(output, report)


def _seeds(text: str) -> list[int]:
    try:
        return [int(seed) for seed in text.split(",")]
    except ValueError as error:
        raise QVLMError(f"--seeds {text!r} is not of whole numbers separated by commas, as 0,1,2") from error


def _subject(
    pretrained: str, calibration: str, tasks: str, limit: int | None, option: Sequence[str] | None, model_args: str
) -> "Subject":
    from qvlm_plugin.report.ablations.evaluation import Subject

    more = pairs(model_args.split(",") if model_args else [])
    return Subject(pretrained, calibration, tuple(tasks.split(",")), limit, pairs(option), more)


def _finish(folder: Path, report: "Report", failed: Sequence[Path] = ()) -> None:
    """Write a report and print its name; runs that it lacks are an error, told after that."""
    typer.echo(report.write(folder))
    if failed:
        logs = ", ".join(map(str, failed))
        raise QVLMError(f"{len(failed)} runs failed and are missing there; the same command tries them again: {logs}")
