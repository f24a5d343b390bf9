"""What is interrupted: a search, an export, an addition to a leaderboard, a comparison; all on tiny things."""

import os
import sys
from pathlib import Path

import torch
from tiny_llava import random_image
from typer.testing import CliRunner

from qvlm_plugin import planning
from qvlm_plugin.calibration import CalibrationSet, Sample
from qvlm_plugin.cli import app
from qvlm_plugin.conversation import Conversation
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.export import export
from qvlm_plugin.models.loading import load
from qvlm_plugin.plan import RoundingPlan
from qvlm_plugin.plan_request import check_request
from qvlm_plugin.report.leaderboard.adding import add_run
from qvlm_plugin.report.results import Grid
from qvlm_plugin.report.writing import Report

OPTIONS = {
    "calibration_batch_size": 2, "veo_epochs": 1, "max_depth": 1, "min_percentile": 0.99, "min_ratio": 0.8,
    "weights": "int", "group_size": 16,
}  # fmt: skip


def samples():
    """Four samples with images."""
    torch.set_num_threads(1)
    shown = [Sample(Conversation.from_prompt(f"what is {i}?", [random_image(i)]), f"it is {i}") for i in range(4)]
    return CalibrationSet(tuple(shown))


def search(model, folder):
    """Search a plan with its cache below ``folder``, and write it there; what `qvlm search` does."""
    loaded, request = load(str(model), dtype="float32"), check_request("qvlm", "w4a4", OPTIONS)
    planning.obtain_plan(loaded, request, samples(), folder / "cache").save(folder / "plan")


def write_checkpoint(model, plan, folder):
    """Export a model in several files."""
    if not (folder / "exported").exists():
        export(RoundingPlan.load(plan), load(str(model), dtype="float32"), folder / "exported", shard_size="20KB")


def add(results, folder):
    """Add a run to a leaderboard."""
    add_run(results, folder / "shared")


def compare(place, folder):
    """Run a grid where the harness is a stand-in for it (`report.stub_harness`)."""
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, [place, *sys.path]))
    grid = ["--models", "tiny", "--methods", "rtn,awq", "--schemes", "w4a4", "--tasks", "pope", "--jobs", "2"]
    done = CliRunner().invoke(app, ["compare", str(folder / "compared"), *grid, "--data", str(place)])
    assert done.exit_code == 0, done.output


def report(folder):
    """Write a report with a figure."""
    table = Grid(("a", "b"), (("1", "2"),))
    Report("found", "Found", "qvlm", [table], [{"a": 1}], ["so it is"], {"svg": b"<svg>" * 4_000}).write(
        folder / "report"
    )


def tell(connection, function, *arguments):
    """Send the one line that ``function`` fails with, or that it is done."""
    try:
        function(*arguments)
        connection.send("done")
    except QVLMError as error:
        connection.send(f"QVLMError: {error}")


def hash_of_search(model, cache, file):
    """Append the hash of a plan, found in a cache or searched, to a file."""
    loaded, request = load(str(model), dtype="float32"), check_request("qvlm", "w4a4", OPTIONS)
    plan = planning.obtain_plan(loaded, request, samples(), cache and Path(cache))
    with file.open("a") as stream:
        stream.write(f"{plan.hash} {plan.search_seconds}\n")
