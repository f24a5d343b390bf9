import json

import pytest
from typer.testing import CliRunner

from qvlm_plugin.cli import app
from qvlm_plugin.doctor.examine import examine
from qvlm_plugin.doctor.finding import Finding, Status

GOOD, POOR, BAD = (Finding(status, status, "so it is", "do that") for status in Status)


def invoke(monkeypatch, found, *arguments):
    """The command with what each of its checks finds."""
    examined = lambda subject, check, *rest: found if subject == "packages" else []  # noqa: E731
    monkeypatch.setattr("qvlm_plugin.doctor.examine.examine", examined)
    return CliRunner().invoke(app, ["doctor", *map(str, arguments)])


@pytest.mark.parametrize(("found", "code"), [([GOOD], 0), ([GOOD, POOR], 0), ([GOOD, BAD, POOR], 1)])
def test_the_exit_status_is_1_if_a_check_fails(monkeypatch, found, code):
    done = invoke(monkeypatch, found)
    assert done.exit_code == code and len(done.stdout.splitlines()) == len(found)
    assert done.stdout.startswith("ok    ok: so it is -> do that")


def test_activities_are_printed_before_and_findings_right_after(monkeypatch):
    first, found, second, *_, last = invoke(monkeypatch, [GOOD]).output.splitlines()
    assert first == "checking packages …" and found == str(GOOD) and second.endswith(" …")
    assert last == "evaluating two documents with a tiny model, about half a minute …"


def test_json_has_every_field(monkeypatch):
    done = invoke(monkeypatch, [GOOD, BAD], "--json")
    assert json.loads(done.stdout)[1] == {
        "subject": "fail", "status": "fail", "message": "so it is", "remedy": "do that",
    }  # fmt: skip


def test_mistakes_exit_with_2(tmp_path):
    runner = CliRunner()
    assert runner.invoke(app, ["doctor", "--scheme", "w9a9"]).exit_code == 2
    assert runner.invoke(app, ["doctor", "--data", str(tmp_path / "absent")]).exit_code == 2


def test_a_check_that_raises_or_cannot_be_imported_is_a_finding():
    (one,) = examine("numbers", "math:factorial", -1)
    assert one.status == "fail" and one.message.startswith("ValueError: ")
    (one,) = examine("nothing", "nothing_of_this_name:check")
    assert one.status == "fail" and "ModuleNotFoundError" in one.message


def test_the_checks_that_it_names_are_there(tiny_llava, tmp_path, warm_python):
    arguments = ["--pretrained", str(tiny_llava), "--data", str(tmp_path), "--tasks", "scienceqa", "--json"]
    done = CliRunner().invoke(app, ["doctor", *arguments])
    subjects = {one["subject"]: one for one in json.loads(done.stdout)}
    expected = {"qvlm_plugin", "packages", "plugins", "lmms-eval", "tasks", "data of scienceqa", "kernel int4 on cpu"}
    assert expected | {"memory", "disk for plans", "trial run"} <= subjects.keys()
    assert "Error" not in done.stdout and subjects["lmms-eval"]["status"] == "ok"
    assert subjects["trial run"]["status"] == "ok" and "2 documents" in subjects["trial run"]["message"]
    assert all(one["remedy"] for one in subjects.values() if one["status"] != "ok")
