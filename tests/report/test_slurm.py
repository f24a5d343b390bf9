"""What Slurm says, by a stand-in for `squeue`; tests/slurm asks a real one."""

import os

import pytest

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.report import slurm
from qvlm_plugin.report.slurm import Queue, State

PROGRAM = "#!/bin/sh\necho >> {folder}/asked\ncat {folder}/answer || {{ echo 'slurm_load_jobs error' >&2; exit 1; }}\n"


@pytest.fixture
def controller(tmp_path, monkeypatch):
    """The folder in whose file ``answer`` is what `squeue` prints; without it, it fails."""
    (tmp_path / "squeue").write_text(PROGRAM.format(folder=tmp_path))
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(slurm, "LOOK_EVERY", 0)
    return tmp_path


def test_states_are_those_of_the_controller(controller):
    (controller / "answer").write_text("7|PENDING|Priority\n8|RUNNING|None\n9|OUT_OF_MEMORY|OutOfMemory\n")
    queue = Queue()
    assert [queue.state(job).name for job in "789"] == ["PENDING", "RUNNING", "OUT_OF_MEMORY"]
    assert [queue.state(job).waits for job in "789"] == [True, False, False]
    assert [queue.state(job).ended for job in "789"] == [False, False, True]
    assert queue.state("7").reason == "Priority"
    (controller / "answer").write_text("8|COMPLETING|None\n")
    assert queue.state("7") == State("", "") and queue.state("7").ended and not queue.state("8").ended


def test_without_an_answer_from_slurm_the_last_states_are_used(controller):
    queue = Queue()
    for _ in range(2):
        with pytest.raises(QVLMError, match=r"squeue failed: .*slurm_load_jobs error"):
            queue.state("7")
        queue.add("7")  # sbatch took a job
    (controller / "answer").write_text("7|RUNNING|None\n")
    assert queue.state("7").name == "RUNNING"
    (controller / "answer").unlink()
    assert queue.state("7").name == "RUNNING"


def test_it_is_asked_now_and_then_for_all_jobs(controller, monkeypatch):
    monkeypatch.setattr(slurm, "LOOK_EVERY", 60)
    (controller / "answer").write_text("7|RUNNING|None\n")
    queue = Queue()
    assert queue.state("7").name == "RUNNING"
    queue.add("8")  # submitted since
    assert queue.state("8").waits and queue.state("7").name == "RUNNING"
    assert (controller / "asked").read_text() == "\n"
