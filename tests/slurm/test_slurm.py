"""Grids as jobs of a real Slurm, of a stand-in for the harness and at last of the harness itself; see `make slurm`."""

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from harness.mirrors import environment_in, write_mirrors
from report.stub_harness import calls, write_stub
from rich.console import Console
from tiny_llava import write_tiny_llava

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.report import slurm
from qvlm_plugin.report.cluster import QUEUED, JobRequest, Jobs
from qvlm_plugin.report.running import run_cells
from qvlm_plugin.report.runs import RUNNING, Cell, Setting, run_cell

pytestmark = pytest.mark.slurm

NONE = Cell("tiny/none/quiz", {"pretrained": "tiny"}, ("quiz",), 40)
RTN = [
    Cell(f"tiny/rtn/{task}", {"pretrained": "tiny", "method": "rtn", "calibration": "x"}, (task,), 40)
    for task in ("quiz", "exam")
]
DEEP = Cell("tiny/deep/quiz", {"pretrained": "tiny", "max_depth": "4"}, ("quiz",), 40)
WAITING = """
import os, time
open("started.txt", "a").write("x")
while not os.path.exists("go"):
    time.sleep(0.1)
"""


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(slurm, "LOOK_EVERY", 0.5)


@pytest.fixture
def place(tmp_path):
    return write_stub(tmp_path / "place")


@pytest.fixture
def setting(tmp_path, place):
    return Setting(tmp_path / "runs", place, jobs=8)


def run(cells, setting, **request):
    """The outcomes, and what was shown."""
    console = Console(file=io.StringIO(), width=160)
    jobs = Jobs("slurm", JobRequest(**{"time": 5} | request), setting)
    return run_cells(cells, setting, "exact_match", console, jobs), console.file.getvalue()


def until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def queue(*options):
    return subprocess.run(["squeue", "--noheader", *options], capture_output=True, text=True).stdout.split()


def block(place):
    """Let evaluations wait for a file ``go``."""
    (place / "lmms_eval.py").write_text(WAITING + (place / "lmms_eval.py").read_text())


def test_a_grid_runs_as_jobs_and_is_known_again(setting, place):
    outcomes, shown = run([NONE, *RTN], setting, sbatch={"comment": "a grid", "exclusive": False})
    assert len(calls(place)) == 3 and not any(one.reused for one in outcomes)
    assert "tiny/rtn/exam: queued as job " in shown and "(Dependency)" in shown  # on the cell that searches the plan
    assert "tiny/none/quiz: done in " in shown and "exact_match 80.0" in shown
    script = next((setting.output / RTN[1].name / "jobs").glob("[0-9]*.sh")).read_text()
    assert "--requeue\n" in script and "--comment='a grid'" in script and "exclusive" not in script
    assert all(one.reused for one in run([NONE, *RTN], setting)[0]) and run_cell(NONE, setting).reused
    assert len(calls(place)) == 3


@pytest.mark.parametrize(
    "request_, message",
    [
        ({"partition": "gone"}, "Slurm refused the job of tiny/none/quiz: .*Invalid partition name specified"),
        ({"gpus": 1}, "Slurm refused the job of tiny/none/quiz: .*Invalid generic resource"),
        ({"memory": 500}, "Slurm refused the job of tiny/none/quiz: .*Requested node configuration is not available"),
        ({"partition": "short"}, "Slurm will never start the job of tiny/none/quiz: .*PartitionTimeLimit"),
    ],
)
def test_a_refused_job_is_one_line_and_leaves_nothing_in_the_queue(setting, place, request_, message):
    with pytest.raises(QVLMError, match=message) as caught:
        run([NONE], setting, **request_)
    assert "\n" not in str(caught.value) and calls(place) == [] and queue() == []


def test_after_a_cell_without_results_jobs_that_wait_are_taken_back(setting, place):
    deep = dataclasses.replace(DEEP, model_args={**RTN[0].model_args, "max_depth": "4"})
    others = [dataclasses.replace(deep, name=f"tiny/deep/{task}", tasks=(task,)) for task in ("exam", "test")]
    with pytest.raises(QVLMError, match=r"tiny/deep/quiz ended without results \(job \d+: completed\): QVLMError: too"):
        run([deep, *others], dataclasses.replace(setting, jobs=2))
    assert len(calls(place)) <= 2 and queue() == []


def test_a_job_past_its_time_says_so(setting, place):
    (place / "lmms_eval.py").write_text("import time\nprint('50%', flush=True)\ntime.sleep(600)")
    with pytest.raises(QVLMError, match=r"tiny/none/quiz ended without results \(job \d+: timeout\): 50%"):
        run([NONE], setting, time=1)


def test_a_requeued_job_runs_again(setting, place):
    block(place)
    jobs = Jobs("slurm", JobRequest(time=5), setting)
    steps, started = jobs.steps(NONE), place / "started.txt"
    until(lambda: next(steps) == RUNNING and started.is_file())
    (job,) = queue("--format=%i")
    subprocess.run(["scontrol", "requeue", job], check=True)
    until(lambda: next(steps).startswith(QUEUED))
    subprocess.run(["scontrol", "update", f"job={job}", "starttime=now"], check=True)  # Slurm waits two minutes
    (place / "go").touch()
    *_, outcome = steps
    assert outcome.results and outcome.job == f"job {job}: completed"
    assert started.read_text() == "xx" and len(calls(place)) == 1


def test_who_starts_a_grid_anew_finds_its_jobs(setting, place):
    block(place)
    command = [sys.executable, "-m", "qvlm_plugin", "compare", setting.output, "--models", "tiny", "--methods", "none"]
    command += ["--schemes", "w4a4", "--tasks", "gqa", "--data", place, "--executor", "slurm", "--time", "5"]
    killed = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    until((place / "started.txt").is_file)
    killed.kill()
    killed.wait()
    interrupted = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    until(lambda: "started" in interrupted.stderr.readline())
    interrupted.send_signal(signal.SIGINT)
    _, shown = interrupted.communicate(timeout=60)
    assert interrupted.returncode == 130 and "tiny/none-w16a16/gqa: its job continues\n" in shown, shown
    assert len(queue("--format=%i")) == 1
    (place / "go").touch()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (place / "started.txt").read_text() == "x" and len(calls(place)) == 1


def test_the_harness_itself(tmp_path):
    """A tiny model in full precision and quantized, by the command line, with what jobs ask for in the grid's file."""
    place = write_mirrors(tmp_path / "place")
    write_tiny_llava(place / "tiny")
    (tmp_path / "grid.yaml").write_text(
        f"models: [{place / 'tiny'}]\nmethods: [rtn]\nschemes: [w4a4]\ntasks: [vqav2_val]\n"
        "calibration: vqav2_val:train:3\nmodel_args: {dtype: float32}\n"
        "options: {rtn: {calibration_batch_size: 3}}\ncluster: {partition: main, memory: 0.9}\n"
    )
    command = [sys.executable, "-m", "qvlm_plugin", "compare", tmp_path / "runs", tmp_path / "grid.yaml"]
    command += ["--data", place, "--executor", "slurm", "--time", "10"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment_in(place))
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "runs" / "comparison.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["none", "rtn"] and rows[1]["documents"] == 6
    scripts = [file.read_text() for file in (tmp_path / "runs").rglob("[0-9]*_submission.sh")]
    assert len(scripts) == 2 and all("--partition=main\n" in text and "--time=10\n" in text for text in scripts)
    assert os.environ["SLURM_CONF"]
