"""kill -9 at random moments: nothing that is there is damaged, and who starts again ends where nobody was killed.

Moments are the n-th change of files, where halves of things are, and times between: in the suite few, drawn with a
fixed seed; with `make fuzz` many, and others each time.
"""

import json
import os
import random
import shutil
import signal
import time
from contextlib import suppress

import pytest
from faults import work
from faults.processes import dying_at, finish, start
from hypothesis import settings
from report.leaderboard.test_adding import compared, facts
from report.leaderboard.written import write_run
from report.stub_harness import write_stub
from tiny_llava import write_tiny_llava

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.models.loading import load
from qvlm_plugin.plan import RoundingPlan
from qvlm_plugin.report.leaderboard.reading import read_run
from qvlm_plugin.report.leaderboard.schema import find_results_files


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_llava(tmp_path_factory.mktemp("killed") / "model", layers=3, vision_layers=2)


def content(folder):
    """All files below a folder by name, without locks; of plans not how long their search took."""
    files = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.suffix != ".lock":
            blob = file.read_bytes()
            if file.name == "plan.json":
                blob = json.dumps(json.loads(blob) | {"search_seconds": 0})
            files[str(file.relative_to(folder))] = blob
    return files


def undisturbed(folder, job):
    """Run a job to its end.

    Returns:
        How many changes of files it took, and how many seconds.
    """
    folder.mkdir()
    count = folder.with_suffix(".count")
    begin = time.monotonic()
    assert finish(start(*job(folder), limits=[(dying_at, 0, folder, count)])) == 0
    return len(count.read_bytes()), time.monotonic() - begin


def kill_again_and_again(tmp_path, job, check, seed, outcome=content):
    """Kill a job again and again, in several folders; each time it goes on where it was, and at last it ends.

    Args:
        tmp_path: of the folders.
        job: folder → function and arguments to `start`.
        check: called with the folder after each.
        seed: of the suite's moments.
        outcome: folder → what must be as it is where nobody was killed.
    """
    changes, seconds = undisturbed(tmp_path / "undisturbed", job)
    expected = outcome(tmp_path / "undisturbed")
    kills = settings.default.max_examples // 20
    seed = seed if settings.default.derandomize else random.randrange(2**32)
    print("seed of the moments:", seed)
    draw, killed, folders = random.Random(seed), 0, 0
    while killed < kills:
        folder = tmp_path / f"killed-{folders}"
        folder.mkdir()
        folders += 1
        left, ended = changes, None
        while ended != 0:
            if killed >= kills or draw.random() < 0.1:
                process = start(*job(folder))
            elif draw.random() < 0.7:
                moment = draw.randint(1, left)
                process, left = start(*job(folder), limits=[(dying_at, moment, folder)]), max(left - moment, 2)
            else:
                process = start(*job(folder))
                process.join(draw.uniform(0, seconds))
                with suppress(ProcessLookupError):
                    # The group, or only the process, whose children go on.
                    os.killpg(process.pid, signal.SIGKILL) if draw.random() < 0.5 else process.kill()
            ended = finish(process)
            assert ended in (0, -signal.SIGKILL)
            killed += ended != 0
            check(folder)
        assert outcome(folder) == expected
        shutil.rmtree(folder)


def test_searches(model, tmp_path):
    def check(folder):
        for plan in [folder / "plan", *(folder / "cache").glob("*" + "[0-9a-f]" * 8)]:
            if plan.exists() and ".steps" not in plan.name and not plan.name.startswith("."):
                RoundingPlan.load(plan)

    kill_again_and_again(tmp_path, lambda folder: (work.search, model, folder), check, seed=0)


def test_exports(model, tmp_path):
    assert finish(start(work.search, model, tmp_path)) == 0

    def check(folder):
        if (folder / "exported").exists():
            load(str(folder / "exported"))

    job = lambda folder: (work.write_checkpoint, model, tmp_path / "plan", folder)  # noqa: E731
    kill_again_and_again(tmp_path, job, check, seed=1)


def test_additions_to_a_leaderboard(tmp_path):
    results = write_run(tmp_path / "run", [1, 0, 1] * 200, facts(calibration=compared(600)))

    def check(folder):
        with suppress(QVLMError):  # none is there yet
            for file in find_results_files([folder / "shared"]):
                assert read_run(file).coverage["quiz"].count == 600

    kill_again_and_again(tmp_path, lambda folder: (work.add, results, folder), check, seed=2)


def test_comparisons(tmp_path):
    place = write_stub(tmp_path / "place")

    def outcome(folder):
        rows = json.loads((folder / "compared" / "comparison.json").read_text())["rows"]
        return [row | {"results": None} for row in rows]

    def check(folder):
        with suppress(FileNotFoundError):
            assert len(outcome(folder)) == 3

    kill_again_and_again(tmp_path, lambda folder: (work.compare, place, folder), check, seed=3, outcome=outcome)
