"""Disks that are full or must not be written: one line says so, nothing half-written stays, and later it works.

A limit to the size of files stands for the full disk: writing fails in the middle of a file, without privileges to fill
a real one.
"""

import multiprocessing

import pytest
from faults import work
from faults.processes import finish, start, with_files_of_at_most, without_privileges
from faults.test_kills import content
from report.leaderboard.test_adding import compared, facts
from report.leaderboard.written import write_run
from tiny_llava import write_tiny_llava


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """Of each kind folder → function and arguments."""
    place = tmp_path_factory.mktemp("disks")
    model = write_tiny_llava(place / "model", layers=1, vision_layers=2)
    assert finish(start(work.search, model, place)) == 0
    results = write_run(place / "run", [1, 0, 1] * 200, facts(calibration=compared(600)))
    return {
        "search": lambda folder: (work.search, model, folder),
        "export": lambda folder: (work.write_checkpoint, model, place / "plan", folder),
        "add": lambda folder: (work.add, results, folder),
        "report": lambda folder: (work.report, folder),
    }


def attempt(job, limit):
    """How a job ends under a limit."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = start(work.tell, theirs, *job, limits=[limit])
    theirs.close()
    assert ours.poll(120), "hangs"
    line = ours.recv()
    assert finish(process) == 0
    return line


KINDS = ["search", "export", "add", "report"]


@pytest.mark.parametrize("size", [0, 1_500, 9_000])
@pytest.mark.parametrize("kind", KINDS)
def test_full_disks(jobs, tmp_path, kind, size):
    line = attempt(jobs[kind](tmp_path), (with_files_of_at_most, size))
    assert (
        "cannot be written: [Errno 27] File too large" in line or "cannot be written: I/O error: File too large" in line
    )
    assert line.startswith("QVLMError: ") and "\n" not in line
    left = content(tmp_path)
    assert all(len(blob) < size or blob == b"" for blob in left.values())
    assert not any(".partial" in name for name in left) and not (tmp_path / "plan").exists()
    assert attempt(jobs[kind](tmp_path), (with_files_of_at_most, -1)) == "done"
    (tmp_path / "elsewhere").mkdir()
    assert attempt(jobs[kind](tmp_path / "elsewhere"), (with_files_of_at_most, -1)) == "done"
    whole = content(tmp_path / "elsewhere")
    assert {name: blob for name, blob in content(tmp_path).items() if not name.startswith("elsewhere/")} == whole


@pytest.mark.parametrize("kind", KINDS)
def test_folders_that_must_not_be_written(jobs, tmp_path, kind):
    (tmp_path / "locked").mkdir(mode=0o555)
    line = attempt(jobs[kind](tmp_path / "locked"), (without_privileges,))
    assert line.startswith("QVLMError: ") and "cannot be written: [Errno 13] Permission denied" in line
    assert not any((tmp_path / "locked").iterdir())


def test_a_cache_that_must_not_be_written_can_be_read(jobs, tmp_path):
    function, model, _ = jobs["search"](tmp_path)
    assert attempt((function, model, tmp_path), (without_privileges,)) == "done"
    cache = tmp_path / "cache"
    for lock in cache.glob("*.lock"):
        lock.unlink()
    cache.chmod(0o555)
    try:
        assert attempt((function, model, tmp_path), (without_privileges,)) == "done"
    finally:
        cache.chmod(0o755)
