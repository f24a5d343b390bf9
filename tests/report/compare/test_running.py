"""Grids are run by a stand-in for the harness that records its calls."""

import dataclasses
import io

import pytest
from report.stub_harness import calls, write_stub
from rich.console import Console

from qvlm_plugin.report.compare.comparison import compare_outcomes
from qvlm_plugin.report.compare.grid import cells, read_grid
from qvlm_plugin.report.compare.running import run_grid
from qvlm_plugin.report.runs import Setting

FLAGS = {"models": ("tiny",), "methods": ("rtn", "awq"), "schemes": ("w4a4",), "tasks": ("quiz", "exam"), "limit": 40}


@pytest.fixture
def place(tmp_path):
    return write_stub(tmp_path / "place")


@pytest.fixture
def setting(place, tmp_path):
    return Setting(tmp_path / "runs", place)


def run(setting, jobs=1, devices=(), **changes):
    todo = cells(read_grid(None, FLAGS | changes))
    console = Console(file=io.StringIO(), width=160)
    return run_grid(todo, setting, "exact_match", jobs, devices, console), console.file.getvalue()


def test_each_cell_runs_once_and_is_known_again(setting, place):
    outcomes, shown = run(setting, jobs=3)
    assert len(calls(place)) == len(outcomes) == 6 and not any(one.reused for one in outcomes)
    assert shown.count("done") >= 6
    again, shown = run(setting)
    assert len(calls(place)) == 6 and all(one.reused for one in again) and "finished before" in shown
    assert [one.cell.name for one in again] == [one.cell.name for one in outcomes]
    (setting.output / again[0].cell.name).rename(setting.output / "elsewhere")  # what results say decides
    assert all(one.reused for one in run(setting)[0])


def test_a_failing_cell_is_told_and_the_rest_goes_on(setting):
    outcomes, shown = run(setting, options={"awq": {"max_depth": "4"}})
    assert [one.results is None for one in outcomes] == [False] * 4 + [True] * 2
    assert "QVLMError: too deep" in shown and "failed" in shown
    compared, trouble = compare_outcomes(outcomes, "exact_match")
    assert len(compared) == 4 and len(trouble) == 2 and all("the run failed, see" in line for line in trouble)


def test_jobs_take_turns_on_devices(setting, place):
    (place / "lmms_eval.py").write_text(
        "import os\nopen('devices.txt', 'a').write(os.environ.get('CUDA_VISIBLE_DEVICES', '-') + '\\n')\n"
    )
    run(setting, jobs=2, devices=("0", "3"))
    assert set((place / "devices.txt").read_text().split()) == {"0", "3"}


def test_comparison_with_full_precision(setting):
    outcomes, _ = run(setting)
    compared, trouble = compare_outcomes(outcomes, "exact_match")
    assert not trouble
    rows = {(one.arguments["method"], one.task): one for one in compared}
    assert rows["none", "quiz"].comparison is None and rows["none", "quiz"].p is None
    rtn, awq = rows["rtn", "quiz"], rows["awq", "quiz"]
    assert rtn.comparison.difference.value == -20 / 40 and awq.comparison.difference.value == -8 / 40
    assert (rtn.comparison.flips.fell, rtn.comparison.flips.rose, rtn.comparison.flips.changed) == (20, 0, 20)
    assert rtn.test == "McNemar" and rtn.p == pytest.approx(2 * 0.5**20) and awq.p == pytest.approx(2 * 0.5**8)
    assert rtn.adjusted == pytest.approx(4 * rtn.p) and awq.adjusted == pytest.approx(2 * awq.p)  # of four tests
    row = awq.row()
    assert row["drop"] == -0.2 and row["drop_low"] < -0.2 < row["drop_high"] and row["right_to_wrong"] == 8


def test_without_full_precision_nothing_is_compared(setting):
    outcomes, _ = run(setting)
    lost = [
        one if one.cell.model_args["method"] != "none" else dataclasses.replace(one, results=None) for one in outcomes
    ]
    compared, trouble = compare_outcomes(lost, "exact_match")
    assert compared == [] and sum("no run in full precision" in line for line in trouble) == 2
