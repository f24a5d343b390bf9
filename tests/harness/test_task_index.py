import os
import shutil
import time
from pathlib import Path

import lmms_eval.tasks
import pytest
from lmms_eval.tasks import TaskManager

from qvlm_plugin.harness import task_index
from qvlm_plugin.harness.task_index import kept_index


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of tasks whose files are a minute old, and a cache of the test's own."""
    monkeypatch.setenv("QVLM_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    (folder / "one").mkdir(parents=True)
    (folder / "one" / "one.yaml").write_text("task: one\n")
    (folder / "one" / "_common").write_text("metric: any\n")  # tasks include files that are not called .yaml, too
    (folder / "broken").symlink_to("nowhere")
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 60)
    return folder


@pytest.fixture
def indexed(folder):
    """Indexes the folder, and notes each time that it had to be read."""
    times = []

    def index(content=None):
        def read():
            times.append(1)
            return content or {name: {"yaml_path": name, "task": -1} for name in sorted(os.listdir(folder))}

        return kept_index(folder, read), len(times)

    return index


def test_a_folder_is_read_once(indexed):
    first, times = indexed()
    assert (indexed(), times) == ((first, 1), 1) and "one" in first


def add(folder):
    (folder / "two.yaml").write_text("task: two\n")


def remove(folder):
    (folder / "one" / "one.yaml").unlink()


def rename(folder):
    (folder / "one" / "one.yaml").rename(folder / "one" / "two.yaml")


def write_with_its_old_time(folder):
    file = folder / "one" / "_common"
    state = file.stat()
    file.write_text("metric: one\n")
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))


def compile_python(folder):
    (folder / "one" / "__pycache__").mkdir()
    (folder / "one" / "__pycache__" / "utils.pyc").touch()


@pytest.mark.parametrize("change", [add, remove, rename, write_with_its_old_time])
def test_a_changed_folder_is_read_again(folder, indexed, change):
    indexed()
    change(folder)
    assert indexed()[1] == 2 == indexed()[1]


def test_what_python_writes_is_no_change(folder, indexed):
    indexed()
    compile_python(folder)
    assert indexed()[1] == 1


def test_a_folder_that_has_just_changed_is_not_kept(folder, indexed, monkeypatch):
    monkeypatch.undo()
    indexed()
    assert indexed()[1] == 2


def test_what_json_cannot_represent_is_not_kept(indexed):
    content = {"one": {"yaml_path": Path("one")}}
    assert indexed(content) == (content, 1) and indexed(content) == (content, 2)
    pairs = {1: "becomes text"}
    assert indexed(pairs) == (pairs, 3) and indexed(pairs) == (pairs, 4)


def test_without_a_cache_a_folder_is_read_each_time(folder, indexed, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("QVLM_CACHE", str(tmp_path / "file" / "cache"))
    assert indexed()[0] == indexed()[0] and indexed()[1] == 3


def test_the_harnesss_own_index_is_kept_as_it_is(folder, monkeypatch):
    few = folder / "few"
    shutil.copytree(Path(lmms_eval.tasks.__file__).parent / "mmmu", few)
    manager = TaskManager.__new__(TaskManager)
    manager.logger = __import__("loguru").logger

    def index():
        return TaskManager._get_task_and_group(manager, str(few))

    first = kept_index(few, index)
    assert first == index() and "mmmu_val" in first
    monkeypatch.setattr(task_index, "_as_json", None)  # nothing is kept again
    assert kept_index(few, lambda: pytest.fail("read again")) == first
