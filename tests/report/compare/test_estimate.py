"""Times of runs that are not finished, from those that are."""

import json

import pytest

from qvlm_plugin.report.compare.estimate import ALIKE, ANY, EXACT, estimate, finished_runs
from qvlm_plugin.report.runs import Cell


def write(folder, arguments, seconds, *, search=None, task="quiz", effective=40, original=200):
    folder.mkdir(parents=True)
    content = {
        "results": {task: {"exact_match,none": 0.5}},
        "n-samples": {task: {"original": original, "effective": effective}},
        "config": {"model": "qvlm_llava", "model_args": ",".join(f"{k}={v}" for k, v in arguments.items())},
        "total_evaluation_time_seconds": str(seconds),
        "qvlm": {"method": arguments["method"], "scheme": "w4a4", "search_seconds": search}
        | ({"calibration": {"source": "x.json:8"}} if search else {}),
    }
    (folder / "1_results.json").write_text(json.dumps(content))


RTN = {"pretrained": "tiny", "method": "rtn", "scheme": "w4a4", "calibration": "x.json:8"}
NONE = {"pretrained": "tiny", "method": "none", "scheme": "w16a16"}


def of(arguments, tmp_path, limit=None, searched=True, task="quiz"):
    return estimate(Cell("cell", arguments, (task,), limit), searched, finished_runs(tmp_path))


def test_the_most_similar_runs_are_used_and_scaled_by_documents(tmp_path):
    assert of(RTN, tmp_path).evaluation is None and of(RTN, tmp_path).search is None
    write(tmp_path / "a", NONE, 8)
    found = of(RTN, tmp_path, limit=10)
    assert (found.evaluation, found.basis, found.search) == (pytest.approx(2), ANY, None)
    write(tmp_path / "b", RTN | {"method": "awq"}, 100 + 16, search=100)
    found = of(RTN, tmp_path)  # all of 200 documents
    assert (found.evaluation, found.basis, found.search) == (pytest.approx(80), ALIKE, None)
    write(tmp_path / "c", RTN, 30 + 20, search=30)
    found = of(RTN | {"seed": "3"}, tmp_path, limit=1000)
    assert (found.evaluation, found.basis, found.search) == (pytest.approx(100), EXACT, 30)
    assert of(RTN, tmp_path, searched=False).search == 0
    assert of(RTN | {"backend": "packed"}, tmp_path).search == 30  # the same plan
    assert of(RTN, tmp_path, task="exam").evaluation is None
    assert of(RTN | {"pretrained": "other"}, tmp_path).evaluation is None


def test_a_plan_from_the_cache_is_no_part_of_a_runs_time(tmp_path):
    write(tmp_path / "a", RTN, 20, search=500)
    found = of(RTN, tmp_path, limit=40)
    assert (found.evaluation, found.search) == (20, 500)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"results": 3}'])
def test_files_without_times_are_left_out(tmp_path, content):
    (tmp_path / "1_results.json").write_text(content)
    write(tmp_path / "a", RTN, 20, search=10)
    file = tmp_path / "a" / "1_results.json"
    file.write_text(file.read_text().replace('"20"', "null"))
    assert finished_runs(tmp_path) == []
