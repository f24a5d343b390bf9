import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from report.leaderboard.written import provenance, write_run
from typer.testing import CliRunner

from qvlm_plugin.cli import app


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_plain_form_writes_all_four_files(tmp_path):
    write_run(tmp_path / "in", [1, 0, 1], provenance())
    write_run(tmp_path / "bad", [1]).write_text("{")
    done = run("leaderboard", tmp_path / "in", tmp_path / "bad", "--out", tmp_path / "out")
    assert done.exit_code == 0 and done.stdout.strip() == str(tmp_path / "out" / "leaderboard.md")
    assert "is not a results file of lmms-eval" in done.stderr and len(done.stderr.strip().splitlines()) == 1
    content = json.loads((tmp_path / "out" / "leaderboard.json").read_text())
    assert set(content["rows"][0]) == set(content["fields"]) and all(content["fields"].values())
    assert len(content["reported"]["tables"]) == 0  # none is about this task
    header, line = (tmp_path / "out" / "leaderboard.csv").read_text().splitlines()
    assert header.split(",") == list(content["fields"]) and line.startswith("1,,,org/model,rtn,w4a4,quiz,exact_match")
    assert (tmp_path / "out" / "leaderboard.html").stat().st_size > 10_000


def test_the_papers_tables_are_shown_with_its_benchmarks(tmp_path):
    write_run(tmp_path / "in", [1, 0, 1], provenance(), task="vizwiz_vqa_val")
    run("leaderboard", tmp_path / "in", "--out", tmp_path / "out")
    content = json.loads((tmp_path / "out" / "leaderboard.json").read_text())
    assert [table["table"] for table in content["reported"]["tables"]] == [3]
    assert len(content["rows"]) == 1 and "45.82" in (tmp_path / "out" / "leaderboard.md").read_text()
    run("leaderboard", tmp_path / "in", "--out", tmp_path / "out", "--no-reported")
    assert "45.82" not in (tmp_path / "out" / "leaderboard.md").read_text()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("missing", "--out", "out"), "missing does not exist"),
        (("add", "missing", "--to", "out"), "is not a results file"),
    ],
)
def test_mistakes_are_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run("leaderboard", *arguments)
    assert done.exit_code == 2 and message in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_nothing_usable_is_an_error(tmp_path):
    write_run(tmp_path / "bad", [1]).write_text("{")
    done = run("leaderboard", tmp_path / "bad", "--out", tmp_path / "out")
    assert done.exit_code == 2 and "none of 1 results files contains a score" in done.stderr


def test_the_ci_job_validates_and_renders_what_was_added(tmp_path):
    template = Path(__file__).parents[2] / "docs" / "leaderboard-ci.yaml"
    (job,) = yaml.safe_load(template.read_text())["jobs"].values()
    scripts = {step["name"]: step["run"] for step in job["steps"] if "qvlm leaderboard" in step.get("run", "")}
    assert [*scripts] == ["Validate every run", "Render"]
    environment = os.environ | {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}

    def job_step(name):
        return subprocess.run(
            ["bash", "-eo", "pipefail", "-c", scripts[name]], cwd=tmp_path, env=environment
        ).returncode

    hashes = {"plan_hash": "1" * 64, "table_hash": "2" * 64, "model_fingerprint": "3" * 64}
    calibration = {"source": "x:train:4", "seed": 0, "documents_compared": 3, "documents_also_evaluated": 0}
    file = write_run(tmp_path / "in", [1, 0, 1], provenance("rtn", **hashes, calibration=calibration))
    assert run("leaderboard", "add", file, "--to", tmp_path / "runs").exit_code == 0
    assert job_step("Validate every run") == 0 and job_step("Render") == 0
    assert (tmp_path / "site" / "leaderboard.html").stat().st_size > 10_000
    (added,) = (tmp_path / "runs").rglob("*_results.json")
    added.write_text(added.read_text().replace("0.6666", "0.9999"))
    assert job_step("Validate every run") != 0
