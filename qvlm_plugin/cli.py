"""The ``qvlm`` command. Commands import what needs torch themselves, so that ``--help`` answers at once."""

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from qvlm_plugin import __version__
from qvlm_plugin.errors import QVLMError

if TYPE_CHECKING:
    from qvlm_plugin.calibration import Sample

app = typer.Typer(
    help="Q-VLM post-training quantization of vision-language models for lmms-eval.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
demo = typer.Typer(help="The embedded small LLaVA and its stand-in data.", no_args_is_help=True)
app.add_typer(demo, name="demo")


def reports_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Show a `QVLMError` as the one line that it is, and exit with status 2."""

    @wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except QVLMError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from error

    return wrapper


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
    pretrained: Annotated[str, typer.Option(help="Checkpoint folder or hub id; 'demo' is the embedded small LLaVA.")],
    method: Annotated[str, typer.Option(help="Quantization method; see `qvlm methods`.")] = "qlora",
    scheme: Annotated[str, typer.Option(help="Bits, for example w4a4 or w4a4+vision:w8a8.")] = "w4a4",
    calibration: Annotated[
        str, typer.Option(help="task:split:n (needs lmms-eval) or file.json:n, several joined by +.")
    ] = "scienceqa:train:64",
    images: Annotated[
        Path | None, typer.Option(help="Folder that a conversation file's image names start from.")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="Option of the method as name=value; may be repeated.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the calibration draw.")] = 0,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")] = "auto",
    device: Annotated[str, typer.Option(help="Torch device.")] = "cpu",
    device_map: Annotated[str | None, typer.Option(help="accelerate's placement, for example auto.")] = None,
) -> None:
    """Search a rounding plan and write it, without running an evaluation.

    An interrupted search goes on where it stopped; a plan that was searched before is taken from the cache.

    Example: qvlm search plans/qlora-w4a4 --pretrained llava-hf/llava-1.5-7b-hf --method qlora --scheme w4a4
    --calibration llava_mix.json:64 --images images/ --device cuda
    """
    from qvlm_plugin.cache import cache_root
    from qvlm_plugin.calibration import read_calibration
    from qvlm_plugin.models.loading import load
    from qvlm_plugin.planning import check_request, obtain_plan

    pairs = [pair.partition("=") for pair in option or []]
    request = check_request(method, scheme, {name: value for name, _, value in pairs})
    samples = read_calibration(calibration, images, seed, _draw_from_task) if request.needs_calibration else None
    loaded = load(_resolve_demo(pretrained), revision=revision, dtype=dtype, device=device, device_map=device_map)
    plan = obtain_plan(loaded, request, samples, cache_root() / "plans")
    typer.echo(plan.save(output))


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
    console.print(facts)
    bits = Table("part", "Linears", "weight bits", "activation bits", title="Effective bits")
    for part, effective in plan.effective_bits().items():
        count = sum(module.part == part for module in plan.modules)
        bits.add_row(part, str(count), f"{effective['weight']:.3f}", f"{effective['activation']:.2f}")
    console.print(bits)
    if modules:
        table = Table("module", "shape", "weight", "activation")
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


def _draw_from_task(task: str, split: str, count: int, seed: int) -> "list[Sample]":
    try:
        from qvlm_plugin.harness.task_source import draw_samples
    except ImportError as error:
        raise QVLMError(f"calibration from task {task!r} needs lmms-eval, which is not installed: {error}") from error
    return draw_samples(task, split, count, seed)


def _resolve_demo(pretrained: str) -> str:
    if pretrained != "demo":
        return pretrained
    from qvlm_plugin.demo.model import build as build_model

    return str(build_model())
