import dataclasses
import os
import shutil
import time
from pathlib import Path

import pytest
from report.stub_harness import calls, write_stub

from qvlm_plugin.report.results import read_results
from qvlm_plugin.report.runs import LOCKED, RUNNING, Cell, Setting, find_results, last_error, log_end, run_cell, steps

CELL = Cell("one", {"pretrained": "tiny", "method": "qvlm"}, ("quiz", "exam"), 5)


def test_a_cell_runs_once(setting, place):
    first = run_cell(CELL, setting)
    assert not first.reused and calls(place) == ["pretrained=tiny,method=qvlm 1"]
    scores = read_results([first.results])
    assert [(score.task, score.documents, score.limited) for score in scores] == [("quiz", 5, True), ("exam", 5, True)]
    again = run_cell(CELL, setting)
    assert again.reused and again.results == first.results and len(calls(place)) == 1


def test_recorded_arguments_identify_a_result_not_its_name(setting, place):
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


def test_several_processes_make_one_result(setting, place):
    outcome = run_cell(CELL, dataclasses.replace(setting, processes=2))
    assert calls(place) == ["pretrained=tiny,method=qvlm 2"]
    assert [outcome.results] == [*setting.output.rglob("*_results.json")]


def test_a_relative_output_folder_is_not_looked_for_in_the_working_directory(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = run_cell(CELL, Setting(Path("here"), place))
    assert outcome.results.resolve().is_relative_to(tmp_path / "here")


def test_a_failed_cell_gives_the_reason(setting, place):
    failing = run_cell(Cell("deep", {**CELL.model_args, "max_depth": "4"}, CELL.tasks), setting)
    assert failing.results is None and failing.status == 0 and log_end(failing.log) == ["QVLMError: too deep"]
    assert failing.failure == f"deep ended without results: QVLMError: too deep; log: {failing.log}"
    (place / "lmms_eval.py").write_text(
        "import os, signal\nprint('50%', flush=True)\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = run_cell(CELL, setting)
    assert killed.failure == f"one ended without results (killed by signal 9): 50%; log: {killed.log}"


def test_closing_ends_the_harness_and_frees_the_cell(setting, place):
    (place / "lmms_eval.py").write_text("import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(600)")
    going = steps(CELL, setting)
    log = setting.output / "one" / "log.txt"
    while not (next(going) == RUNNING and log_end(log)):
        time.sleep(0.05)
    other = steps(CELL, setting)
    assert next(other) == next(other) == LOCKED
    going.close()
    with pytest.raises(ProcessLookupError):
        os.kill(int(log_end(log)[0]), 0)
    write_stub(place)
    assert next(other) == RUNNING  # its turn
    *_, outcome = other
    assert outcome.results


def test_the_end_of_a_log_is_what_a_terminal_would_show(tmp_path):
    log = tmp_path / "log.txt"
    assert log_end(log) == []
    log.write_text("a\n\n \x1b[32mb\x1b[0m\x1b[A\n  0%|   | 0/9\r 50%|## | 4/9\r")
    assert log_end(log) == ["a", " b", " 50%|## | 4/9"]
    log.write_text("x" * 200_000 + "\n" + "\n".join(map(str, range(40))))
    assert log_end(log) == [str(number) for number in range(25, 40)]


LOGURU = (
    "\x1b[32m2026-11-28 03:54:29\x1b[0m | \x1b[31m\x1b[1mERROR   \x1b[0m | \x1b[36mlmms_eval.__main__\x1b[0m:"
    "\x1b[36mcli_evaluate\x1b[0m:\x1b[36m614\x1b[0m - \x1b[31m\x1b[1m{}\x1b[0m\n"
)
RAISED = """\
Traceback (most recent call last):
  File "lmms_eval/__main__.py", line 583, in cli_evaluate
    results, samples = cli_evaluate_single(args)
                       ^^^^^^^^^^^^^^^^^^^^^^^^^
  File "qvlm_plugin/scheme.py", line 85, in _parse_widths
    raise QVLMError(f"scheme={text!r}: {bits} bits; allowed are {MIN_BITS} to {MAX_BITS}, and {UNQUANTIZED}")
qvlm_plugin.errors.QVLMError: scheme='w9a9': 9 bits; allowed are 2 to 8, and 16
"""
ENDED = "Error during evaluation: {}. Please set `--verbosity=DEBUG` to get more information."
SCHEME = "qvlm_plugin.errors.QVLMError: scheme='w9a9': 9 bits; allowed are 2 to 8, and 16"
IMPORT = """\
Traceback (most recent call last):
  File "huggingface_hub/utils/_fixes.py", line 12, in <module>
    from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout
  File "filelock/_unix.py", line 11, in <module>
    from ._api import BaseFileLock
ModuleNotFoundError: No module named 'filelock._api'
"""
CHAINED = """
During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "zipfile.py", line 1355, in _RealGetContents
    raise BadZipFile("File is not a zip file")
zipfile.BadZipFile: File is not a zip file
"""
BAR = "Model Responding:  45%|####5     | 45/100 [00:10<00:12]\r"


@pytest.mark.parametrize(
    "text, error",
    [
        (RAISED + LOGURU.format(ENDED.format("scheme='w9a9': 9 bits; allowed are 2 to 8, and 16")), SCHEME),
        (RAISED + "\n" + BAR, SCHEME),
        (IMPORT, "ModuleNotFoundError: No module named 'filelock._api'"),
        (IMPORT + CHAINED, "zipfile.BadZipFile: File is not a zip file"),
        (IMPORT + LOGURU.format("Tasks were not found: nosuch"), "Tasks were not found: nosuch"),
        ("".join(f"[rank1]: {line}\n" for line in RAISED.splitlines()), SCHEME),
        ("usage: x\nQVLMError: too deep\nbye", "QVLMError: too deep"),
        (IMPORT.replace("No module named 'filelock._api'", "a\n\nb") + LOGURU.format(ENDED.format("a\n\nb")),
         "ModuleNotFoundError: a"),
        ("loading\n" + BAR, "Model Responding:  45%|####5     | 45/100 [00:10<00:12]"),
        ("", ""),
    ],
)  # fmt: skip
def test_the_last_error_of_a_log(tmp_path, text, error):
    """The texts are the harness's, with fewer frames and without the folders of packages."""
    (tmp_path / "log.txt").write_bytes(text.encode())
    assert last_error(tmp_path / "log.txt") == error
