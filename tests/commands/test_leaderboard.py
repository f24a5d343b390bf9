import json

import pytest
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


def test_the_papers_tables_stand_beside_its_benchmarks(tmp_path):
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
    assert done.exit_code == 2 and "none of 1 results files holds a score" in done.stderr
