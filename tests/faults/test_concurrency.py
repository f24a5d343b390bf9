"""The same search, twice and eight times at once: one plan."""

import pytest
from faults import work
from faults.processes import finish, start
from tiny_llava import write_tiny_llava

from qvlm_plugin.plan import RoundingPlan


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_llava(tmp_path_factory.mktemp("shared") / "model", layers=2, vision_layers=2)


def searched(model, cache, file, count):
    """The hash and search time that each of ``count`` processes got."""
    processes = [start(work.hash_of_search, model, cache, file) for _ in range(count)]
    assert [finish(process) for process in processes] == [0] * count
    return file.read_text().splitlines()


def test_the_same_search_twice_gives_the_same_plan(model, tmp_path):
    first, second = searched(model, None, tmp_path / "hashes", 2)
    assert first.split()[0] == second.split()[0] and first != second  # both were searched


def test_eight_processes_at_once_search_one_plan(model, tmp_path):
    lines = searched(model, tmp_path / "cache", tmp_path / "hashes", 8)
    assert len(lines) == 8 and len(set(lines)) == 1  # also the time that it took
    (plan,) = (path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock")
    assert RoundingPlan.load(plan).hash == lines[0].split()[0]
    (alone,) = searched(model, None, tmp_path / "alone", 1)
    assert alone.split()[0] == lines[0].split()[0]
