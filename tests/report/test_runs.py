import dataclasses
import shutil
from pathlib import Path

import pytest
from report.stub_harness import calls, write_stub

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.report.results import read_results
from qvlm_plugin.report.runs import Cell, Setting, find_results, log_end, run_cell, run_cells

CELL = Cell("one", {"pretrained": "tiny", "method": "qvlm"}, ("quiz", "exam"), 5)


@pytest.fixture
def place(tmp_path):
    return write_stub(tmp_path / "place")


@pytest.fixture
def setting(place, tmp_path):
    return Setting(tmp_path / "runs", place)


def test_a_cell_runs_once(setting, place):
    first = run_cell(CELL, setting)
    assert not first.reused and calls(place) == ["pretrained=tiny,method=qvlm 1"]
    scores = read_results([first.results])
    assert [(score.task, score.documents, score.limited) for score in scores] == [("quiz", 5, True), ("exam", 5, True)]
    again = run_cell(CELL, setting)
    assert again.reused and again.results == first.results and len(calls(place)) == 1


def test_what_a_result_says_decides_not_its_name(setting, place):
    run_cell(CELL, setting)
    shutil.move(setting.output / "one", setting.output / "moved")
    reordered = {"method": "qvlm", "pretrained": "tiny"}
    same = Cell("other-name", reordered, ("exam", "quiz"), 5)
    assert run_cell(same, setting).reused
    for change in (
        {"limit": None},
        {"limit": 6},
        {"tasks": ("quiz",)},
        {"model_args": {"pretrained": "tiny"}},
        {"model_args": {**CELL.model_args, "method": "rtn"}},
        {"model_args": {**CELL.model_args, "seed": "1"}},
    ):
        before = len(calls(place))
        changed = dataclasses.replace(CELL, name="moved", **change)
        assert not run_cell(changed, setting).reused and len(calls(place)) == before + 1
        assert run_cell(changed, setting).reused and len(calls(place)) == before + 1


def test_a_damaged_result_is_run_anew(setting, place):
    outcome = run_cell(CELL, setting)
    outcome.results.write_text(outcome.results.read_text()[:40])
    assert find_results(CELL, setting.output) is None
    assert not run_cell(CELL, setting).reused and len(calls(place)) == 2
    outcome.results.write_text("[]")
    assert run_cell(CELL, setting).reused


def test_a_failing_cell_is_told_and_the_rest_goes_on(setting, place, capfd):
    failing = Cell("deep", {**CELL.model_args, "max_depth": "4"}, CELL.tasks)
    outcomes = run_cells([failing, CELL], setting)
    assert [outcome.results is None for outcome in outcomes] == [True, False]
    assert log_end(outcomes[0].log) == ["QVLMError: too deep"]
    told = capfd.readouterr().err
    assert "deep failed" in told and "QVLMError: too deep" in told
    run_cells([failing, CELL], setting)
    assert [line.split()[0].endswith("max_depth=4") for line in calls(place)] == [True, False, True]


def test_several_processes_make_one_result(setting, place):
    outcome = run_cell(CELL, dataclasses.replace(setting, processes=2))
    assert calls(place) == ["pretrained=tiny,method=qvlm 2"]
    assert [outcome.results] == [*setting.output.rglob("*_results.json")]


def test_a_relative_output_folder_is_not_looked_for_in_the_working_directory(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = run_cell(CELL, Setting(Path("here"), place))
    assert outcome.results.resolve().is_relative_to(tmp_path / "here")


def test_the_working_directory_must_exist(tmp_path):
    with pytest.raises(QVLMError, match="missing' does not exist"):
        run_cells([CELL], Setting(tmp_path, tmp_path / "missing"))
