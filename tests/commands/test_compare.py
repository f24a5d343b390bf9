import json
import re
from types import SimpleNamespace

import pytest
from models.test_pre_quantized import compressed
from report.stub_harness import calls, write_stub
from tiny_llava import write_tiny_llava
from typer.testing import CliRunner

from qvlm_plugin.cli import app

GRID = "models: [tiny]\nmethods: [rtn, awq]\nschemes: [w4a4, w6a6]\ntasks: [pope]\nlimit: 40\n"


@pytest.fixture
def place(tmp_path):
    (tmp_path / "grid.yaml").write_text(GRID)
    return write_stub(tmp_path / "place")


def run(tmp_path, *arguments):
    command = ["compare", tmp_path / "out", tmp_path / "grid.yaml", "--data", tmp_path / "place", *arguments]
    return CliRunner().invoke(app, [str(argument) for argument in command])


def test_a_grid_ends_in_a_comparison_and_resumes(place, tmp_path):
    shown = run(tmp_path, "--dry-run")
    assert shown.exit_code == 0 and not (tmp_path / "out").exists()
    runs, summary = shown.stdout.split("\n\n")
    assert len(runs.splitlines()) == 5 and "5 runs, 0 of them finished\ntime: unknown" in summary
    assert "--model_args pretrained=tiny,method=rtn,scheme=w4a4" in shown.stdout.replace("\n", " ")
    done = run(tmp_path, "--jobs", "2")
    assert done.exit_code == 0, done.output
    written, *verdicts = done.stdout.splitlines()
    assert written == str(tmp_path / "out" / "comparison.md") and len(calls(place)) == 5
    assert len(verdicts) == 4 and verdicts[0].startswith("rtn w4a4 is 50.0 points below full precision [-")
    report = json.loads((tmp_path / "out" / "comparison.json").read_text())
    differences = {(row["method"], row["scheme"]): row.get("difference") for row in report["rows"]}
    assert differences == {
        ("none", "w16a16"): None, ("rtn", "w4a4"): -0.5, ("rtn", "w6a6"): -0.5, ("awq", "w4a4"): -0.2,
        ("awq", "w6a6"): -0.2,
    }  # fmt: skip
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert "Stand-in data" in text and "McNemar" in text and "covers all 4 rows" in text
    assert (tmp_path / "out" / "comparison.svg").is_file()
    runs, summary = run(tmp_path, "--dry-run").stdout.split("\n\n")
    assert all("finished: " in line for line in runs.splitlines()) and summary == "5 runs, 5 of them finished\n"
    assert run(tmp_path, "--schemes", "w4a4").exit_code == 0 and len(calls(place)) == 5


def test_runs_may_be_jobs_with_resources_from_the_file_or_options(place, tmp_path):
    (tmp_path / "grid.yaml").write_text(GRID + "cluster: {time: 3, partition: some, sbatch: {account: me}}\n")
    done = run(tmp_path, "--schemes", "w4a4", "--executor", "local", "--jobs", "3", "--time", "2")
    assert done.exit_code == 0, done.output
    assert len(calls(place)) == 3 and len(list((tmp_path / "out").rglob("jobs/*_submitted.pkl"))) == 3
    assert run(tmp_path, "--schemes", "w4a4").exit_code == 0 and len(calls(place)) == 3


def test_a_checkpoint_quantized_by_others_is_one_row_beside_all_schemes(place, tmp_path):
    folder, _ = compressed(write_tiny_llava(tmp_path / "theirs-w4a16", hidden=64), [])
    rows = GRID.replace("[rtn, awq]", "[rtn, theirs]") + f"options: {{theirs: {{pretrained: {folder}}}}}\n"
    (tmp_path / "grid.yaml").write_text(rows)
    shown = run(tmp_path, "--dry-run").stdout
    assert f"--model_args pretrained={folder} " in shown.replace("\n", " ") and "4 runs, 0 of them" in shown
    done = run(tmp_path)
    assert done.exit_code == 0, done.output
    assert calls(place).count(f"pretrained={folder} 1") == 1 and len(calls(place)) == 4
    report = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [(row["method"], row["scheme"], row.get("difference")) for row in report["rows"]] == [
        ("none", "w16a16", None), ("rtn", "w4a4", -0.5), ("rtn", "w6a6", -0.5), ("theirs", "w4a16", -0.25),
    ]  # fmt: skip
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert "theirs w4a16 is 25.0 points below" in text and "their checkpoints' schemes: theirs." in text


def test_seeds_are_cells_and_extend_a_finished_grid(place, tmp_path):
    assert run(tmp_path, "--schemes", "w4a4").exit_code == 0 and len(calls(place)) == 3
    done = run(tmp_path, "--schemes", "w4a4", "--seeds", "0,7", "--baseline", "rtn")
    assert done.exit_code == 0, done.output
    assert [line.split("seed=")[1] for line in calls(place)[3:]] == ["7 1", "7 1"]
    _, verdict = done.stdout.splitlines()
    assert verdict.startswith("awq is 30.0 points above rtn [+") and "over 2 seeds and 40 documents" in verdict
    assert verdict in (tmp_path / "out" / "comparison.md").read_text()
    (tmp_path / "grid.yaml").write_text(GRID + "seeds: [0, 7]\nbaseline: rtn\n")
    shown = run(tmp_path, "--dry-run").stdout.split("\n\n")[0].splitlines()
    assert len(shown) == 1 + 2 * 2 * 2 and sum("finished: " in line for line in shown) == 5


def test_a_missing_cell_stops_the_grid_unless_keep_going_is_set(place, tmp_path):
    (tmp_path / "grid.yaml").write_text(GRID.replace("[rtn, awq]", "[qvlm]") + "options: {qvlm: {max_depth: 4}}\n")
    log = tmp_path / "out" / "tiny" / "qvlm-w4a4" / "pope" / "log.txt"
    done = run(tmp_path)
    assert done.exit_code == 2 and not (tmp_path / "out" / "comparison.md").exists()
    assert done.stderr.splitlines()[-1] == (
        f"error: tiny/qvlm-w4a4/pope ended without results: QVLMError: too deep; log: {log} "
        "(1 runs were not started; --keep-going starts them)"
    )
    done = run(tmp_path, "--keep-going")
    assert done.exit_code == 2 and "2 runs are missing; the same command runs them again" in done.stderr
    assert "Missing: tiny/qvlm-w4a4/pope ended without" in (tmp_path / "out" / "comparison.md").read_text()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--methods", "rtm"), "rtm"),
        (("--schemes", "w9a9"), "9 bits; allowed are"),
        (("--data", "missing"), "no such folder"),
        (("--tasks", "a,a"), "error: --tasks: values must be unique"),
        (("--tasks", "scienceqa,sciencqa_img"), "lmms-eval has no task 'sciencqa_img'; did you mean scienceqa_img"),
        (("--seeds", "0,x"), "error: --seeds: input should be a valid integer"),
        (("--model-args", "seed=3"), "error: --model-args: give seed=3 in seeds instead"),
        (
            ("--baseline", "qlora"),
            "error: --baseline: qlora is not among the methods; allowed are none, previous, rtn",
        ),
        (("--executor", "pbs"), "--executor pbs is not known; allowed are local, slurm"),
        (("--gpus", "2", "--time", "9"), "--gpus applies to jobs only; add --executor local or --executor slurm"),
        (("--executor", "local", "--devices", "0,1"), "--devices does not apply to jobs; use --gpus"),
        (("--executor", "local", "--memory", "0"), "error: --memory: input should be greater than 0"),
    ],
)
@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_mistakes_are_one_line_before_anything_runs(place, tmp_path, arguments, message, dry, monkeypatch):
    index = SimpleNamespace(all_tasks=["scienceqa_img", "gqa"], match_tasks=lambda names: [])  # indexing takes seconds
    monkeypatch.setattr("qvlm_plugin.harness.task_names._indexed", lambda: index)
    done = run(tmp_path, *arguments, *dry)
    assert done.exit_code == 2 and message in done.stderr and calls(place) == []
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_dry_run_estimates_time_and_memory_and_names_the_basis(place, tmp_path, tiny_llava):
    """The stub's runs take the time that they say: 10 s for 40 documents, searches of 64 s aside."""
    stub, timed = place / "lmms_eval.py", '"total_evaluation_time_seconds": "74.0", "config": {'
    stub.write_text(stub.read_text().replace('"config": {', timed))
    grid = ("--models", tiny_llava, "--model-args", "dtype=float32")
    unknown = run(tmp_path, *grid, "--dry-run").stdout
    assert "time: unknown\n- evaluation of 5 runs: unknown, no run of the same model" in unknown
    found = [float(text) for text in re.findall(r"([\d.]+) GB to (?:search|evaluate)", unknown)]
    assert len(found) == 1 + 2 * 4 and "- search: by the formula" in unknown
    assert run(tmp_path, *grid, "--methods", "rtn", "--schemes", "w4a4").exit_code == 0
    more = ("--methods", "rtn,smoothquant", "--schemes", "w4a4", "--seeds", "0,7")
    runs, summary = run(tmp_path, *grid, *more, "--dry-run").stdout.split("\n\n")
    told = {line.split("/")[1]: line.split(": ")[1].split(",")[0] for line in runs.splitlines()}
    assert told == {
        "none-w16a16": "finished",
        "rtn-w4a4": "finished",
        "rtn-w4a4-seed7": "about 1 min 14 s",
        "smoothquant-w4a4": "about 10 s and a search",
        "smoothquant-w4a4-seed7": "about 10 s and a search",
    }
    assert "5 runs, 2 of them finished\ntime: about 1 min 34 s plus unknown parts\n" in summary
    assert "- evaluation of 1 runs: from finished runs of the same method and scheme" in summary
    assert "- 2 searches: unknown" in summary and "- 1 searches: from finished runs of the same method" in summary
