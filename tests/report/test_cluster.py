"""Cells as submitit's jobs on this machine, of a stand-in for the harness; tests/slurm has the same on a Slurm."""

import dataclasses
import io
import pickle
import sys
import time

import pytest
from report.stub_harness import calls
from rich.console import Console

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.report.cluster import JobRequest, Jobs
from qvlm_plugin.report.running import run_cells
from qvlm_plugin.report.runs import LOCKED, RUNNING, Cell, command, log_end, run_cell, steps

CELLS = [Cell(f"tiny/{method}/quiz", {"pretrained": "tiny", "method": method}, ("quiz",), 40) for method in ("a", "b")]
DEEP = Cell("tiny/deep/quiz", {"pretrained": "tiny", "max_depth": "4"}, ("quiz",), 40)
WAITING = """
import os, time
while not os.path.exists("go"):
    time.sleep(0.1)
"""


@pytest.fixture
def jobs(setting):
    return Jobs("local", JobRequest(), setting)


def run(cells, setting, jobs):
    """The outcomes, and what was shown."""
    console = Console(file=io.StringIO(), width=160)
    return run_cells(cells, setting, "exact_match", console, jobs), console.file.getvalue()


def test_each_cell_is_a_job_and_is_known_again_by_whoever_runs_it(setting, place, jobs):
    outcomes, shown = run(CELLS, dataclasses.replace(setting, jobs=2), jobs)
    assert sorted(calls(place)) == ["pretrained=tiny,method=a 1", "pretrained=tiny,method=b 1"]
    assert all(log_end(one.log) == ["loading"] and not one.reused for one in outcomes)
    assert shown.count(": started\n") == 2 and "exact_match 80.0 ± 2.0 (2 of 2)" in shown
    assert run_cell(CELLS[0], setting).reused
    assert all(one.reused for one in run(CELLS, setting, jobs)[0]) and len(calls(place)) == 2


def test_only_a_command_line_is_pickled(setting, place, jobs):
    run(CELLS[:1], setting, jobs)
    (pickled,) = (setting.output / CELLS[0].name / "jobs").glob("*_submitted.pkl")
    named = []

    class Listing(pickle.Unpickler):
        def find_class(self, module, name):
            named.append(f"{module}.{name}")
            return super().find_class(module, name)

    with pickled.open("rb") as stream:
        submission = Listing(stream).load()
    assert named == ["submitit.core.utils.DelayedSubmission", "submitit.core.utils.CommandFunction"]
    assert submission.function.command[-len(command(CELLS[0], setting)) :] == command(CELLS[0], setting)
    assert all(isinstance(part, str) for part in submission.function.command) and submission.args == ()


def test_a_failed_cell_gives_the_reason(setting, jobs):
    with pytest.raises(QVLMError) as caught:
        run([DEEP], setting, jobs)
    log = setting.output / DEEP.name / "log.txt"
    assert str(caught.value).startswith("tiny/deep/quiz ended without results (job ")
    assert str(caught.value).endswith(f"): QVLMError: too deep; log: {log}")


def test_a_job_that_outlives_who_submitted_it_is_waited_for(setting, place, jobs):
    (place / "lmms_eval.py").write_text(WAITING + (place / "lmms_eval.py").read_text())
    first, log = jobs.steps(CELLS[0]), setting.output / CELLS[0].name / "log.txt"
    while not (next(first) == RUNNING and log.is_file()):
        time.sleep(0.05)
    first.close()
    as_process, as_job = steps(CELLS[0], setting), Jobs("local", JobRequest(), setting).steps(CELLS[0])
    assert next(as_process) == next(as_job) == LOCKED
    (place / "go").touch()
    for waiting in (as_process, as_job):
        *_, outcome = waiting
        assert outcome.reused
    assert len(calls(place)) == 1


def test_missing_programs_are_reported_before_anything_runs(setting, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(QVLMError, match="--executor slurm: sbatch not found"):
        Jobs("slurm", JobRequest(), setting)
    for program, missing in (("sbatch", "squeue"), ("squeue", "scancel"), ("scancel", "srun")):
        (tmp_path / program).touch(mode=0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(QVLMError, match=f"{missing} not found"):
            Jobs("slurm", JobRequest(), setting)
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(QVLMError, match=r"--executor needs: pip install 'qvlm_plugin\[cluster\]'"):
        Jobs("local", JobRequest(), setting)
    assert not setting.output.exists()
