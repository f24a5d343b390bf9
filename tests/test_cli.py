import json

import pytest
from tiny_llava import random_image
from typer.testing import CliRunner

from qvlm_plugin import __version__
from qvlm_plugin.cli import app
from qvlm_plugin.plan import RoundingPlan


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("QVLM_CACHE", str(tmp_path / "cache"))


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def rows(tmp_path):
    random_image(0).save(tmp_path / "0.png")
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "that"}]
    (tmp_path / "rows.json").write_text(json.dumps([{"image": "0.png", "conversations": turns}] * 4))
    return tmp_path / "rows.json"


def test_search_writes_a_plan_that_inspect_prints(tiny_llava, rows, tmp_path):
    searched = run(
        "search", tmp_path / "plan", "--pretrained", tiny_llava, "--method", "qlora", "--scheme", "w4a4+vision:w8a8",
        "--calibration", f"{rows}:4", "--option", "norm=1.5", "--option", "ratio_step=0.25", "--seed", "3",
    )  # fmt: skip
    assert searched.exit_code == 0, searched.output
    assert searched.stdout.splitlines()[-1] == str(tmp_path / "plan")
    plan = RoundingPlan.load(tmp_path / "plan")
    assert (plan.scheme, plan.options["norm"], plan.calibration.seed) == ("w4a4+vision:w8a8", 1.5, 3)
    shown = run("inspect", tmp_path / "plan", "--modules").stdout
    assert plan.hash[:20] in shown.replace("\n", "") and "norm=1.5" in shown
    assert "4.127" in shown and "8.127" in shown


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("search", "out", "--pretrained", "/absent", "--scheme", "w9a9"), "9 bits; allowed are"),
        (("search", "out", "--pretrained", "/absent", "--option", "foo=1"), "unknown argument 'foo'"),
        (("search", "out", "--pretrained", "/absent", "--calibration", "x"), "neither task:split:n"),
        (("search", "out", "--pretrained", "/absent", "--scheme", "w4a16"), "no such folder"),
        (("inspect", "/absent"), "plan.json is missing"),
        (("results", "/absent"), "is not a results file"),
    ],
)
def test_mistakes_are_one_line_on_stderr_and_exit_with_2(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2 and message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1 and "Traceback" not in result.output


def test_methods_lists_what_can_be_chosen():
    shown = run("methods").stdout
    assert all(word in shown for word in ("none", "rtn", "qlora", "ratio_step", "group_size"))


def test_help_has_examples_and_version_is_printed():
    for command in (["search"], ["inspect"], ["methods"], ["results"], ["demo", "build"], ["demo", "data"]):
        assert "Example: " in run(*command, "--help").stdout
    assert run("--version").stdout.strip() == __version__
