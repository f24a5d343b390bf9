import json
import re
import sys
from itertools import product

import pytest
import torch
from report.logged import scored, write_run
from tiny_llava import random_image
from typer.main import get_command
from typer.testing import CliRunner

from qvlm_plugin import __version__
from qvlm_plugin.cli import app
from qvlm_plugin.models.placement import default_device
from qvlm_plugin.plan import RoundingPlan
from qvlm_plugin.plan_header import CalibrationRecord


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
        "--option", "calibration_batch_size=4",
    )  # fmt: skip
    assert searched.exit_code == 0, searched.output
    assert searched.stdout.splitlines()[-1] == str(tmp_path / "plan")
    assert searched.stderr.splitlines()[0] == f"device: {default_device()}"
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
        (("search", "out", "--pretrained", "/absent", "--device", "gpu"), "device='gpu' is not a device; write cpu"),
        (("search", "out", "--pretrained", "/absent", "--device", "cuda:97"), "this machine has .* CUDA devices"),
        (("search", "out", "--pretrained", "/absent", "--device", "meta"), "has no memory for weights"),
        (("search", "out", "--pretrained", "/absent", "--device", "hpu"), "device='hpu' cannot be used here"),
        (("export", "out", "--pretrained", "/absent", "--method", "rtn", "--device", "hip:x"), "is not a device"),
        (
            ("export", "out", "--pretrained", "/absent", "--method", "rtn", "--shard-size", "5"),
            "--shard-size 5: write a",
        ),
        (
            ("export", "out", "--pretrained", "/absent", "--method", "rtn", "--format", "compressed-tensors"),
            "cannot express w4a4 of the decoder .*; allowed are w4a16, w8a16, w4a8, w8a8",
        ),
        (
            (
                "export",
                "out",
                "--pretrained",
                "/absent",
                "--method",
                "qlora",
                "--scheme",
                "w4a16",
                "--format",
                "compressed-tensors",
            ),
            "cannot express weights=nf; add --option weights=int",
        ),
        (("search", "/dev/null/plan", "--pretrained", "/absent"), "'/dev/null' cannot be written"),
        (("export", "/proc/out", "--pretrained", "/absent", "--method", "rtn"), "'/proc/out' cannot be written"),
        (("search", "tests", "--pretrained", "/absent"), "'tests' holds files other than a plan"),
        (("search", "out", "--pretrained", "/absent", "--scheme", "w4a16"), "no such folder"),
        (("inspect", "/absent"), "plan.json is missing"),
        (("trace", "/absent"), "no such folder"),
        (("results", "/absent"), "/absent does not exist; name results files"),
        (("paired", "/absent", "/other"), "/absent does not exist; name results files"),
    ],
)
def test_mistakes_are_one_line_on_stderr_and_exit_with_2(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2 and re.search(message, result.stderr)
    assert len(result.stderr.strip().splitlines()) == 1 and "Traceback" not in result.output


@pytest.mark.parametrize(
    "command", [("search",), ("export", "--method", "qlora"), ("ablate", "fig2"), ("ablate", "sources")], ids=str
)
def test_a_checkpoint_that_there_is_not_is_found_before_data_is_looked_for(command, tmp_path, monkeypatch):
    for module in ("shared", "ablate"):
        monkeypatch.setattr(f"qvlm_plugin.commands.{module}.draw_from_task", lambda *_: pytest.fail("read a task"))
    result = run(*command, tmp_path / "out", "--pretrained", "a/b/c")
    assert result.exit_code == 2 and "pretrained='a/b/c': there is no such folder" in result.stderr


@pytest.mark.parametrize(
    "command",
    [("search",), ("export", "--method", "rtn"), ("convert",), ("ablate", "fig2"), ("ablate", "fig3c")],
    ids=str,
)
def test_what_is_asked_for_in_place_of_the_files_is_heard_by_every_command(command, tiny_llava, tmp_path):
    out = tmp_path / "out"
    source = [tiny_llava, out] if command == ("convert",) else [out, "--pretrained", tiny_llava]
    result = run(*command, *source, "--image-aspect-ratio", "pad")
    assert result.exit_code == 2 and "image_aspect_ratio is only for checkpoints in LLaVA's own layout" in result.stderr


@pytest.mark.parametrize("command", ["search", "export", "plot", "ablate fig2", "ablate fig3c", "ablate sources"])
def test_a_model_is_put_on_the_accelerator_where_there_is_one(command, tiny_llava, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda check_available: torch.device("xpu"))
    arguments = [tmp_path / "out", "--pretrained", tiny_llava, *(["--method", "rtn"] if command == "export" else [])]
    if command == "plot":
        record = {"cdm": {"blocks": [{"layers": [0], "percentiles": [{"layers.0.mlp": 1.0}]}], "dependencies": [1.0]}}
        calibration = CalibrationRecord(source="x.json:4", seed=0, digests=("0",))
        RoundingPlan("qvlm", "w4a4", {}, "model", (), calibration=calibration, record=record).save(tmp_path / "out")
    result = run(*command.split(), *arguments)
    assert result.exit_code == 2 and "device='xpu' cannot be used here" in result.stderr


def test_what_cannot_be_written_is_found_before_the_search(tiny_llava, rows, tmp_path, monkeypatch):
    monkeypatch.setattr("qvlm_plugin.planning.obtain_plan", lambda *_: pytest.fail("searched"))
    (tmp_path / "taken").write_text("a file")
    for command in ("search", "export"):
        result = run(command, tmp_path / "taken", "--pretrained", tiny_llava, "--method", "rtn", "--calibration", rows)
        assert result.exit_code == 2 and "taken" in result.stderr


def test_sources_that_do_not_parse_are_found_before_the_weights(tiny_llava, tmp_path, monkeypatch):
    monkeypatch.setattr("qvlm_plugin.models.loading.load_weights", lambda *_, **__: pytest.fail("loaded"))
    result = run("search", tmp_path / "plan", "--pretrained", tiny_llava, "--calibration", "x")
    assert result.exit_code == 2 and "neither task:split:n" in result.stderr


def test_methods_lists_what_can_be_chosen():
    shown = run("methods").stdout
    assert all(word in shown for word in ("none", "rtn", "qlora", "ratio_step", "group_size"))


@pytest.fixture
def pair(tmp_path):
    """A folder of two runs over the same 20 documents of two tasks; the second has half of one task wrong."""
    for name, right in (("none", 20), ("rtn", 10)):
        tasks = {"quiz": scored([1] * 20), "other": scored([1] * right + [0] * (20 - right))}
        write_run(tmp_path / "runs" / name, tasks, qvlm={"method": name, "scheme": "w4a4"})
    return tmp_path / "runs"


def test_paired_compares_runs_with_a_baseline(pair):
    shown = run("paired", pair / "none", pair / "rtn", "--markdown")
    assert shown.exit_code == 0, shown.output
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in shown.stdout.splitlines() if line[:1] == "|"]
    assert [row[:2] for row in rows[2:]] == [["rtn w4a4", task] for task in ("other", "quiz", "average")]
    assert rows[2][2:4] == ["100.0 [83.9, 100.0]", "50.0 ± 11.5"] and rows[2][4].startswith("-50.00 [-74.01, -25.99]")
    assert rows[2][5:] == ["0.002", "0.006", "10 / 0 / 0"] and rows[3][5:] == ["1.000", "1.000", "0 / 0 / 0"]
    table = run("paired", pair / "none", pair).stdout  # the folder of all runs holds the baseline too
    assert table.count(" rtn w4a4 ") == 2 * 3 and "\n none w4a4" not in table and "Holm over all 3 rows" in table


def test_paired_says_what_is_wrong_with_its_runs(pair, monkeypatch):
    def complaint(*arguments):
        result = run("paired", *arguments)
        assert result.exit_code == 2 and len(result.stderr.strip().splitlines()) == 1
        return result.stderr

    assert "2 results files; name one" in complaint(pair, pair / "rtn")
    assert "no run to compare with the baseline" in complaint(pair / "rtn", pair / "rtn")
    assert "metric 'acc'; allowed are exact_match" in complaint(pair / "none", pair / "rtn", "--metric", "acc")
    for module in ("estimates", "paired", "paired_table", "significance"):
        monkeypatch.delitem(sys.modules, f"qvlm_plugin.report.{module}", raising=False)
    monkeypatch.setitem(sys.modules, "scipy", None)
    assert "pip install 'qvlm_plugin[report]'" in complaint(pair / "none", pair / "rtn")


def test_help_has_examples_and_version_is_printed():
    for command in (["search"], ["inspect"], ["methods"], ["results"], ["paired"], ["demo", "build"], ["demo", "data"]):
        assert "Example: " in run(*command, "--help").stdout
    assert run("--version").stdout.strip() == __version__


def test_help_fits_80_columns_and_lists_commands_with_their_whole_first_sentence(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    commands = get_command(app).commands
    inner = [
        (name, *under)
        for name, command in commands.items()
        for under in [(), *product(vars(command).get("commands", ()))]
    ]
    for command in ((), *inner):
        text = run(*command, "--help").stdout
        assert max(map(len, text.splitlines())) <= 80 and "..." not in text.partition("Commands:")[2]
    paragraph = run("advise", "--help").stdout.split("\n\n")[2].splitlines()
    assert len(paragraph) > 3 and min(map(len, paragraph[:-1])) > 65  # one paragraph is wrapped as a whole
