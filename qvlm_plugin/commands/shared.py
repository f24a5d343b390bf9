"""Options and helpers that several commands share. Imports nothing slow."""

import re
import shlex
import sys
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from qvlm_plugin.demo import resolve_demo
from qvlm_plugin.errors import QVLMError

if TYPE_CHECKING:
    import torch

    from qvlm_plugin.calibration import Sample
    from qvlm_plugin.methods.shard import Shard
    from qvlm_plugin.models.loading import Checkpoint, LoadedModel
    from qvlm_plugin.plan import RoundingPlan
    from qvlm_plugin.plan_request import PlanRequest
    from qvlm_plugin.report.results import Grid

_UNITS = {"MB": 1e6, "GB": 1e9, "MiB": 2**20, "GiB": 2**30}

Key = TypeVar("Key", bound=Hashable)


def _device(named: str | None) -> str:
    """The device that ``--device`` names, or the default."""
    from qvlm_plugin.models.placement import default_device

    return named or str(default_device())


Pretrained = Annotated[str, typer.Option(help="Checkpoint folder or hub id; 'demo' is the embedded small LLaVA.")]
OneScheme = Annotated[str, typer.Option(help="Bits of weights and activations, such as w4a4 or w4a4+vision:w8a8.")]
Source = Annotated[
    str,
    typer.Option(
        help="Calibration samples: n of a task's split, task:split:n (needs lmms-eval), or of a file, file.json:n. "
        "Join several sources by +."
    ),
]
Images = Annotated[Path | None, typer.Option(help="Folder of the images that a calibration file names.")]
MethodOptions = Annotated[
    list[str] | None,
    typer.Option("--option", help="Option of the method, as name=value; may be repeated. See `qvlm arguments`."),
]
Seed = Annotated[
    int, typer.Option(help="Seed of the choice of calibration samples, and of random choices in the search.")
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")]
Conv = Annotated[str | None, typer.Option(help="Prompt format, such as vicuna_v1; default: the checkpoint's.")]
RouterNoiseSeed = Annotated[
    int | None,
    typer.Option(min=0, help="For MoE-LLaVA: add noise with this seed when experts are chosen; default: no noise."),
]
ImageAspectRatio = Annotated[
    str | None,
    typer.Option(
        help="For checkpoints in LLaVA's own layout: how images are made square, square or pad; "
        "default: the checkpoint's."
    ),
]
Topology = Annotated[
    str,
    typer.Option(
        help="Where the model's parts are listed: described, by a description of its family; traced, found by running "
        "it, for other families."
    ),
]
Dtype = Annotated[str, typer.Option(help="Floating-point type: float32, float16, bfloat16, or auto: the checkpoint's.")]
Device = Annotated[
    str | None,
    typer.Option(
        callback=_device,
        help="Torch device, such as cpu or cuda:1; default: the accelerator if there is one, else cpu.",
    ),
]
AsJSON = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Markdown = Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")]
KeepGoing = Annotated[
    bool, typer.Option("--keep-going", help="If a run fails, continue with the others and compare the finished ones.")
]


@contextmanager
def needs_report_packages() -> Iterator[None]:
    """Turns an ImportError in its body into an error that names the extra "report"."""
    try:
        yield
    except ImportError as error:
        raise QVLMError(f"{error}; this command needs: pip install 'qvlm_plugin[report]'") from error


@contextmanager
def working_in(directory: Path | None) -> Iterator[None]:
    """Changes the working directory to ``directory`` for its body."""
    if directory is not None and not directory.is_dir():
        raise QVLMError(f"--data {directory}: no such folder")
    with chdir(directory or "."):
        yield


def print_grid(grid: "Grid", markdown: bool = False) -> None:
    """Print a table as wide as the terminal, or as Markdown."""
    from rich.console import Console

    if markdown:
        typer.echo(grid.markdown())
    else:
        console = Console()
        console.print(grid.rich(console.width))


def pairs(options: Sequence[str] | None) -> dict[str, str]:
    """Parse ``name=value`` texts."""
    return {name: value for name, _, value in (pair.partition("=") for pair in options or [])}


def parse_size(text: str, flag: str) -> float:
    """Bytes of a size such as 4GB or 3.5 GiB, which the option ``flag`` gives.

    Raises:
        QVLMError: the text is not a size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)", text.strip())
    units = {unit.lower(): count for unit, count in _UNITS.items()}
    if not found or found[2].lower() not in units:
        raise QVLMError(f"{flag} {text}: write a number and one of {', '.join(_UNITS)}, such as 4GB")
    return float(found[1]) * units[found[2].lower()]


def command_line() -> str:
    """This call of the command, as typed in a shell."""
    return shlex.join(["qvlm", *sys.argv[1:]])


def draw_from_task(task: str, split: str, count: int, seed: int) -> "list[Sample]":
    """Calibration samples from one of the harness's tasks."""
    try:
        from qvlm_plugin.harness.task_source import draw_samples
    except ImportError as error:
        raise QVLMError(f"calibration from task {task!r} needs lmms-eval, which is not installed: {error}") from error
    from loguru import logger

    logger.disable("lmms_eval")  # it logs each of its files that is no task
    try:
        return draw_samples(task, split, count, seed)
    finally:
        logger.enable("lmms_eval")


def opened(
    pretrained: str, dtype: str, device: "str | torch.device", topology: str | None = "described", **opening: Any
) -> "Checkpoint":
    """Open a checkpoint in full precision by its small files, so that faults are reported before weights are read.

    Prints the device.

    Args:
        pretrained, opening: see `open_checkpoint`.
        dtype, device: compute type and device of the model that will be loaded.
        topology: ``described`` by a plugin, or ``traced``; None if it is not needed.
    """
    from qvlm_plugin.models.loading import open_checkpoint
    from qvlm_plugin.models.placement import check_placement, device_name
    from qvlm_plugin.planning import require_full_precision
    from qvlm_plugin.tracing.trace import open_with_topology

    placed = check_placement(dtype, device)
    pretrained = resolve_demo(pretrained)
    if topology is None:
        checkpoint = open_checkpoint(pretrained, **opening)
    else:
        checkpoint = open_with_topology(pretrained, topology, **opening)
    require_full_precision(checkpoint.config, checkpoint.source)
    name = device_name(placed)
    typer.echo(f"device: {placed}" + f" ({name})" * (name != placed.type), err=True)
    return checkpoint


def obtain_plans(
    requests: "Mapping[Key, PlanRequest]",
    calibration: str,
    images: Path | None,
    seed: int,
    checkpoint: "Checkpoint",
    shard: "Shard | None" = None,
    **placement: Any,
) -> "tuple[LoadedModel, dict[Key, RoundingPlan]]":
    """The model in full precision, and a plan for each request, searched or from the cache.

    Args:
        requests: checked requests.
        calibration, images, seed: see `read_calibration`; not read if no request needs samples.
        checkpoint: see `opened`.
        shard: this process's share if several search together.
        placement: see `load_weights`.
    """
    from qvlm_plugin.cache import cache_root
    from qvlm_plugin.calibration import read_calibration
    from qvlm_plugin.models.loading import load_weights
    from qvlm_plugin.plan_request import check_calibration
    from qvlm_plugin.planning import obtain_plan

    needed = any(request.needs_calibration for request in requests.values())
    samples = read_calibration(calibration, images, seed, draw_from_task) if needed else None
    for request in requests.values():
        check_calibration(request, samples)
    loaded = load_weights(checkpoint, **placement)
    cache = cache_root() / "plans"
    return loaded, {key: obtain_plan(loaded, request, samples, cache, shard) for key, request in requests.items()}
