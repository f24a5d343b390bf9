"""Whatever happens in a command, it ends in one line."""

import json

import pytest
from report.logged import scored, write_run
from typer.testing import CliRunner

from qvlm_plugin.cli import app
from qvlm_plugin.errors import QVLMError


def run(*arguments, **environment):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env=environment)


def one_line(result):
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    (line,) = result.stderr.strip().splitlines()
    return line


@pytest.fixture
def odd_results(tmp_path):
    """A results file that lacks something, beside one that does not."""
    known = {"method": "rtn", "scheme": "w4a4"}
    write_run(tmp_path / "right", {"quiz": scored([1, 0])}, qvlm=known | {"plan_hash": "0a"})
    write_run(tmp_path / "odd", {"quiz": scored([1, 0])}, qvlm=known)
    (file,) = (tmp_path / "odd").rglob("*_results.json")
    return file


def test_an_unexpected_exception_names_the_file_and_the_traceback_switch(odd_results, monkeypatch):
    monkeypatch.setattr("qvlm_plugin.report.results._bits", lambda run: run["plan_hash"])
    line = one_line(run("results", odd_results.parents[2], COLUMNS="80"))
    assert line.startswith("error: KeyError: ") and str(odd_results) in line
    assert "qvlm_plugin/report/results.py, line " in line and "QVLM_TRACEBACK=1" in line
    shown = run("results", odd_results.parents[2], QVLM_TRACEBACK="1")
    assert "Traceback (most recent call last)" in shown.stderr and line in shown.stderr.splitlines()


def test_another_command_in_a_group_does_the_same(tmp_path, monkeypatch):
    def fail(*_):
        raise ZeroDivisionError("of\nsome lines")

    monkeypatch.setattr("qvlm_plugin.demo.data.write_mirrors", fail)
    line = one_line(run("demo", "data", tmp_path))
    assert "ZeroDivisionError: of some lines (" in line and "qvlm_plugin/commands/demo.py" in line


def test_a_row_of_samples_is_named(tmp_path, monkeypatch):
    write_run(tmp_path, {"quiz": scored([1, 0])})
    monkeypatch.setattr("qvlm_plugin.report.samples.document", lambda sample: sample["doc_id"].absent)
    assert "_results.json; qvlm_plugin/report/samples.py" in one_line(run("paired", tmp_path, tmp_path))


def test_mistakes_of_the_user_keep_their_status_and_typers_own_errors_their_form(tmp_path, monkeypatch):
    def mistake(*_):
        raise QVLMError("not like this")

    monkeypatch.setattr("qvlm_plugin.report.results.read_results", mistake)
    result = run("results", tmp_path)
    assert (result.exit_code, result.stderr) == (2, "error: not like this\n")
    assert "Traceback" in run("results", tmp_path, QVLM_TRACEBACK="1").stderr
    assert "Missing argument" in run("results").stderr and run("results").exit_code == 2
    assert run("absent").exit_code == 2 and run("--version").exit_code == 0


def test_a_pipe_that_was_closed_is_no_error(tmp_path, monkeypatch):
    def close(*_):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("qvlm_plugin.report.results.read_results", close)
    result = run("results", tmp_path)
    assert result.exit_code == 1 and "QVLM_TRACEBACK" not in result.stderr and json.dumps(result.stdout) == '""'
