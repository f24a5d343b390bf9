"""``qvlm compare``: run a grid of methods and test the differences."""

from pathlib import Path
from typing import Annotated, Any

import typer

from qvlm_plugin.commands.shared import KeepGoing, command_line, needs_report_packages, pairs
from qvlm_plugin.errors import QVLMError


def compare(
    output: Annotated[Path, typer.Argument(help="Folder of the runs and of the comparison.")],
    grid: Annotated[
        Path | None, typer.Argument(help="YAML file that lists the runs; options replace its values.")
    ] = None,
    models: Annotated[str | None, typer.Option(help="Checkpoint folders or hub ids, separated by commas.")] = None,
    methods: Annotated[str | None, typer.Option(help="Quantization methods, separated by commas.")] = None,
    schemes: Annotated[str | None, typer.Option(help="Bits, such as w4a4, separated by commas.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Tasks of lmms-eval, separated by commas.")] = None,
    calibration: Annotated[
        str | None, typer.Option(help="Calibration samples: task:split:n or file.json:n; join several by +.")
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option(
            help="Seeds of the choice of calibration samples, separated by commas; default: the grid file's, else 0."
        ),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            help="Method that the others are compared with; default: the grid file's, else none (full precision)."
        ),
    ] = None,
    model_args: Annotated[
        str | None, typer.Option(help="More model arguments for every run, such as dtype=float16, separated by commas.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Evaluate only this many documents of each task; default: all.")
    ] = None,
    metric: Annotated[str | None, typer.Option(help="Metric to compare; default: exact_match.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Documents per forward pass.")] = 8,
    processes: Annotated[int, typer.Option(min=1, help="Processes that share the documents of each run.")] = 1,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Number of runs at a time; default: one for each device, on Slurm all.")
    ] = None,
    devices: Annotated[
        str | None, typer.Option(help="CUDA devices, such as 0,1; each run gets one of them in turn.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Working directory of the runs: local copies of data sets are looked up in it.")
    ] = None,
    executor: Annotated[
        str | None,
        typer.Option(
            help="Submit each run as a job, on slurm or local (this machine); default: run it as a child process."
        ),
    ] = None,
    partition: Annotated[str | None, typer.Option(help="Slurm partition; default: the cluster's default.")] = None,
    gpus: Annotated[int | None, typer.Option(min=0, help="GPUs of each job; default: none.")] = None,
    time: Annotated[int | None, typer.Option(min=1, help="Time limit of each job in minutes; default: 1440.")] = None,
    memory: Annotated[
        float | None, typer.Option(help="Memory of each job in GB; default: the cluster's default.")
    ] = None,
    keep_going: KeepGoing = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Run nothing: print which runs are finished, and the estimated time and memory of the others.",
        ),
    ] = False,
) -> None:
    """Run models × methods × schemes × seeds × tasks, each in its own process, and compare them with a baseline.

    Full precision is always included. Finished runs, recognized by their recorded arguments, are not run again. Stops
    at the first run that fails, unless --keep-going is given. Writes comparison.md, .json, .svg and .png, and prints a
    verdict. With --executor slurm --partition gpu --gpus 1 --time 240 each run is a Slurm job; jobs continue after
    this command is interrupted, and the same command finds them again.

    Example: qvlm compare results --models demo --methods qlora,awq,qvlm --schemes w6a6,w4a4 --seeds 0,1,2
    --baseline qlora --tasks qvlm_scienceqa,qvlm_vizwiz,qvlm_vqav2 --data demo-data
    --calibration calibration/train.json:64
    """
    from qvlm_plugin.atomic import make_folder
    from qvlm_plugin.commands.dry_run import dry_run_lines
    from qvlm_plugin.harness.task_names import check_task_names
    from qvlm_plugin.report.cluster import Jobs
    from qvlm_plugin.report.compare.grid import cells, read_grid
    from qvlm_plugin.report.runs import Setting

    given = {name: _names(text) for name, text in (("models", models), ("methods", methods), ("schemes", schemes))}
    given |= {"tasks": _names(tasks), "seeds": _names(seeds), "baseline": baseline}
    given |= {"calibration": calibration, "limit": limit, "metric": metric}
    request = {"partition": partition, "gpus": gpus, "time": time, "memory": memory}
    given |= {"cluster": _request(executor, devices, request)}
    compared_grid = read_grid(grid, given | {"model_args": pairs(model_args.split(",")) if model_args else None})
    runs, cuda_devices = [grid_cell.cell for grid_cell in cells(compared_grid)], _names(devices) or ()
    jobs = jobs or (len(runs) if executor == "slurm" else max(1, len(cuda_devices)))
    setting = Setting(output, data, batch_size, processes, jobs=jobs, devices=cuda_devices, keep_going=keep_going)
    if data is not None and not data.is_dir():
        raise QVLMError(f"--data {data}: no such folder")
    check_task_names(compared_grid.tasks, data or Path())
    if dry_run:
        typer.echo("\n".join(dry_run_lines(compared_grid, setting)))
        return
    with needs_report_packages():
        from qvlm_plugin.report.compare.comparison import compare_outcomes
        from qvlm_plugin.report.compare.report import compare_report
        from qvlm_plugin.report.running import run_cells

    submitted = executor and Jobs(executor, compared_grid.cluster, setting)
    make_folder(output)
    outcomes = run_cells(runs, setting, compared_grid.metric, jobs=submitted)
    compared, problems = compare_outcomes(compared_grid, outcomes)
    if not compared:
        raise QVLMError(f"no run can be compared: {problems[0]}")
    report = compare_report(compared_grid, compared, problems, command_line())
    typer.echo(report.write(output))
    for sentence in report.verdicts:
        typer.echo(sentence)
    if problems:
        raise QVLMError(f"{len(problems)} runs are missing; the same command runs them again: {problems[0]}")


def _request(executor: str | None, devices: str | None, flags: dict[str, Any]) -> dict[str, Any]:
    """The job's resources that are given as options."""
    from qvlm_plugin.report.cluster import EXECUTORS

    given = {name: value for name, value in flags.items() if value is not None}
    if executor not in (None, *EXECUTORS):
        raise QVLMError(f"--executor {executor} is not known; allowed are {', '.join(EXECUTORS)}")
    if executor is None and given:
        raise QVLMError(f"--{next(iter(given))} applies to jobs only; add --executor local or --executor slurm")
    if executor is not None and devices is not None:
        raise QVLMError("--devices does not apply to jobs; use --gpus")
    return given


def _names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(name.strip() for name in text.split(","))
