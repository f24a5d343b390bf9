"""Grids are run by a stand-in for the harness that records its calls."""

import dataclasses
import io
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from report.stub_harness import calls
from rich.console import Console

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.report import running
from qvlm_plugin.report.compare.grid import cells, read_grid
from qvlm_plugin.report.running import run_cells
from qvlm_plugin.report.runs import Setting

FLAGS = {"models": ("tiny",), "methods": ("rtn", "qvlm"), "schemes": ("w4a4",), "tasks": ("quiz", "exam"), "limit": 40}


def run(setting, terminal=False, **changes):
    """The outcomes, and what was shown."""
    console = Console(file=io.StringIO(), width=160, force_terminal=terminal)
    todo = [one.cell for one in cells(read_grid(None, FLAGS | changes))]
    return run_cells(todo, setting, "exact_match", console), console.file.getvalue()


def test_each_cell_runs_once_and_is_known_again(setting, place):
    outcomes, shown = run(dataclasses.replace(setting, jobs=3))
    assert len(calls(place)) == len(outcomes) == 6 and not any(one.reused for one in outcomes)
    assert shown.count("started\n") == 6 and shown.count(": done in ") == 6 and shown.count("(6 of 6)") == 1
    assert re.search(r"tiny/rtn-w4a4/quiz: done in \d+ s, exact_match 80.0 ± 2.0 \(\d of 6\)", shown)
    again, shown = run(setting)
    assert len(calls(place)) == 6 and all(one.reused for one in again) and "finished before" in shown
    assert [one.cell.name for one in again] == [one.cell.name for one in outcomes]
    (setting.output / again[0].cell.name).rename(setting.output / "elsewhere")  # what results say decides
    assert all(one.reused for one in run(setting)[0])


def test_it_stops_at_the_first_cell_without_results(setting, place):
    changes = {"methods": ("qvlm", "rtn"), "options": {"qvlm": {"max_depth": "4"}}}
    log = setting.output / "tiny" / "qvlm-w4a4" / "quiz" / "log.txt"
    with pytest.raises(QVLMError) as caught:
        run(setting, **changes)
    assert str(caught.value) == (
        f"tiny/qvlm-w4a4/quiz ended without results: QVLMError: too deep; log: {log} "
        "(3 runs were not started; --keep-going starts them)"
    )
    assert len(calls(place)) == 3
    with pytest.raises(QVLMError, match="tiny/qvlm-w4a4/quiz ended"):
        run(setting, **changes)
    assert len(calls(place)) == 4  # the finished ones are known


def test_it_stops_at_the_first_cell_without_the_metric(setting, place):
    todo = [one.cell for one in cells(read_grid(None, FLAGS))]
    for _ in range(2):  # after a run, and with its results found
        with pytest.raises(QVLMError, match=r"--metric acc: .*_results\.json has no such metric; it has exact_match$"):
            run_cells(todo, setting, "acc")
        assert len(calls(place)) == 1
    assert len(run_cells(todo, dataclasses.replace(setting, keep_going=True), "acc")) == len(calls(place)) == 6


def test_cells_that_run_already_are_let_finish(setting, place):
    (place / "lmms_eval.py").write_text(
        "import sys, time\ntime.sleep(0 if 'max_depth=4' in str(sys.argv) else 2)\n"
        + (place / "lmms_eval.py").read_text()
    )
    changes = {"methods": ("qvlm",), "options": {"qvlm": {"max_depth": "4"}}, "tasks": ("quiz",)}
    with pytest.raises(QVLMError, match="tiny/qvlm-w4a4/quiz ended"):
        run(dataclasses.replace(setting, jobs=2), **changes)
    outcomes, _ = run(setting, methods=("none",), tasks=("quiz",))
    assert [one.reused for one in outcomes] == [True]


def test_a_failed_cell_is_reported_and_keep_going_runs_the_others(setting):
    outcomes, shown = run(dataclasses.replace(setting, keep_going=True), options={"qvlm": {"max_depth": "4"}})
    assert [one.results is None for one in outcomes] == [False] * 4 + [True] * 2
    assert "QVLMError: too deep" in shown and "failed" in shown


def test_jobs_take_turns_on_devices(setting, place):
    (place / "lmms_eval.py").write_text(
        "import os\nopen('devices.txt', 'a').write(os.environ.get('CUDA_VISIBLE_DEVICES', '-') + '\\n')\n"
    )
    run(dataclasses.replace(setting, jobs=2, devices=("0", "3"), keep_going=True))
    assert set((place / "devices.txt").read_text().split()) == {"0", "3"}


SLEEPING = """
import os, sys, time
open("pids.txt", "a").write(f"{os.getpid()}\\n")
for step in range(600):
    print(f" {step}/600", end="\\r", flush=True)
    time.sleep(0.2)
"""


def test_progress_is_printed_in_lines_without_a_terminal(setting, place, monkeypatch):
    monkeypatch.setattr(running, "LINE_EVERY", 0.3)
    (place / "lmms_eval.py").write_text(SLEEPING.replace("600", "6"))
    _, shown = run(dataclasses.replace(setting, keep_going=True), methods=("none",), tasks=("quiz",))
    lines = shown.splitlines()
    assert lines[0] == "tiny/none-w16a16/quiz: started" and "\r" not in shown and "\x1b" not in shown
    assert re.fullmatch(r"tiny/none-w16a16/quiz: running, \d s: \d/6", lines[2]), shown
    assert lines[-2:] == [
        f"tiny/none-w16a16/quiz failed; last lines of {setting.output}/tiny/none-w16a16/quiz/log.txt:",
        " 5/6",
    ]
    assert any(re.fullmatch(r"tiny/none-w16a16/quiz: failed in \d s \(1 of 1\)", line) for line in lines)


def test_a_terminal_shows_a_table(setting):
    _, shown = run(setting, terminal=True)
    assert "5 more" in shown and re.search(r"running, \d s", shown) and "started" not in shown
    rows = [shown.index(f"{name}: done in ") for name in ("tiny/none-w16a16/quiz", "tiny/qvlm-w4a4/exam")]
    assert rows[0] < shown.rindex("running, ") < rows[1]  # each as its cell ends
    _, shown = run(setting, terminal=True)
    assert shown.count("finished before") == 6 and "80.0" in shown


def test_an_interrupt_ends_the_harness_too(setting, place, tmp_path):
    (place / "lmms_eval.py").write_text(SLEEPING)
    script = (
        "import signal, sys\nfrom qvlm_plugin.cli import app\n"
        # What a shell starts in the background ignores interrupts, and so do its children.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "app(['compare', sys.argv[1], '--models', 'a,b,c', '--methods', 'none', '--schemes', 'w4a4', '--tasks', "
        "'pope', '--data', sys.argv[2], '--jobs', '2'])\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(setting.output), str(place)], stderr=subprocess.PIPE, text=True
    )
    pids = place / "pids.txt"
    while not (pids.is_file() and len(pids.read_text().split()) == 2):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)  # to it alone, as `kill -INT` does; a terminal tells the whole group
    _, shown = process.communicate(timeout=120)
    assert process.returncode == 130, shown
    assert shown.count(": interrupted\n") == 2 and shown.endswith("interrupted; the same command resumes\n")
    for pid in pids.read_text().split():
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)
    assert len(pids.read_text().split()) == 2  # the third was not started


def test_the_working_directory_must_exist(tmp_path):
    with pytest.raises(QVLMError, match="missing' does not exist"):
        run_cells([], Setting(tmp_path, tmp_path / "missing"))
