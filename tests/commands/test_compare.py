import json

import pytest
from report.stub_harness import calls, write_stub
from typer.testing import CliRunner

from qvlm_plugin.cli import app

GRID = "models: [tiny]\nmethods: [rtn, awq]\nschemes: [w4a4, w6a6]\ntasks: [quiz]\nlimit: 40\n"


@pytest.fixture
def place(tmp_path):
    (tmp_path / "grid.yaml").write_text(GRID)
    return write_stub(tmp_path / "place")


def run(tmp_path, *arguments):
    command = ["compare", tmp_path / "out", tmp_path / "grid.yaml", "--data", tmp_path / "place", *arguments]
    return CliRunner().invoke(app, [str(argument) for argument in command])


def test_a_grid_ends_in_a_comparison_and_goes_on_where_it_stopped(place, tmp_path):
    shown = run(tmp_path, "--dry-run")
    assert shown.exit_code == 0 and len(shown.stdout.splitlines()) == 5 and not (tmp_path / "out").exists()
    assert "--model_args pretrained=tiny,method=rtn,scheme=w4a4" in shown.stdout.replace("\n", " ")
    done = run(tmp_path, "--jobs", "2")
    assert done.exit_code == 0, done.output
    assert done.stdout.strip() == str(tmp_path / "out" / "comparison.md") and len(calls(place)) == 5
    report = json.loads((tmp_path / "out" / "comparison.json").read_text())
    drops = {(row["method"], row["scheme"]): row.get("drop") for row in report["rows"]}
    assert drops == {
        ("none", "w16a16"): None, ("rtn", "w4a4"): -0.5, ("rtn", "w6a6"): -0.5, ("awq", "w4a4"): -0.2,
        ("awq", "w6a6"): -0.2,
    }  # fmt: skip
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert "Stand-in data" in text and "McNemar" in text and "over all 4 rows" in text
    assert (tmp_path / "out" / "comparison.svg").is_file()
    assert all("finished: " in line for line in run(tmp_path, "--dry-run").stdout.splitlines())
    assert run(tmp_path, "--schemes", "w4a4").exit_code == 0 and len(calls(place)) == 5


def test_a_missing_cell_is_an_error_after_the_report(place, tmp_path):
    (tmp_path / "grid.yaml").write_text(GRID.replace("[rtn, awq]", "[qvlm]") + "options: {qvlm: {max_depth: 4}}\n")
    done = run(tmp_path)
    assert done.exit_code == 2 and "2 runs are missing there; the same command tries them again" in done.stderr
    assert "Missing: tiny/qvlm-w4a4/quiz: the run failed" in (tmp_path / "out" / "comparison.md").read_text()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--methods", "rtm"), "rtm"),
        (("--schemes", "w9a9"), "9 bits; allowed are"),
        (("--data", "missing"), "there is no such folder"),
        (("--tasks", "a,a"), "each name must be there once"),
    ],
)
def test_mistakes_are_one_line_before_anything_runs(place, tmp_path, arguments, message):
    done = run(tmp_path, *arguments)
    assert done.exit_code == 2 and message in done.stderr and calls(place) == []
    assert len(done.stderr.strip().splitlines()) == 1
