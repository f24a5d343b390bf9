import os
import shutil
import time
from pathlib import Path

import lmms_eval.tasks
import pytest
from lmms_eval.tasks import TaskManager
from loguru import logger

from qvlm_plugin.harness import tasks
from qvlm_plugin.harness.task_index import kept_index

NOW = time.time


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of tasks whose files are a minute old, and a cache of the test's own."""
    monkeypatch.setenv("QVLM_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    (folder / "one").mkdir(parents=True)
    (folder / "one" / "one.yaml").write_text("task: one\n")
    (folder / "one" / "_common").write_text("metric: any\n")  # tasks include files that are not called .yaml, too
    (folder / "broken").symlink_to("nowhere")
    (tmp_path / "utils.py").touch()
    monkeypatch.setattr(time, "time", lambda: NOW() + 60)
    return folder


@pytest.fixture
def indexed(folder):
    """Indexes the folder, and notes each time that it had to be read."""
    times = []

    def index(content=None, meanwhile=lambda folder: None):
        def read():
            times.append(1)
            meanwhile(folder)
            return content or {name: {"yaml_path": name, "task": -1} for name in sorted(os.listdir(folder))}

        return kept_index(folder, folder.parent / "utils.py", read), len(times)

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
    time.sleep(0.05)  # the clock of the file system may tick this slowly
    file.write_text("metric: one\n")
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))


def change_the_parser(folder):
    (folder.parent / "utils.py").write_text("# another version")


def compile_python(folder):
    (folder / "one" / "__pycache__").mkdir()
    (folder / "one" / "__pycache__" / "utils.pyc").touch()


@pytest.mark.parametrize("change", [add, remove, rename, write_with_its_old_time, change_the_parser])
def test_a_changed_folder_is_read_again(folder, indexed, change):
    indexed()
    change(folder)
    assert indexed()[1] == 2 == indexed()[1]


def test_what_python_writes_is_no_change(folder, indexed):
    indexed()
    compile_python(folder)
    assert indexed()[1] == 1


def test_a_folder_that_has_just_changed_is_not_kept(folder, indexed, monkeypatch):
    monkeypatch.setattr(time, "time", NOW)
    indexed()
    assert indexed()[1] == 2


def test_a_folder_that_changes_while_it_is_read_is_not_kept(indexed):
    indexed(meanwhile=add)
    assert indexed()[1] == 2 == indexed()[1]


@pytest.mark.parametrize("name", ["_common", "../_common", "one.yaml"])
def test_what_may_have_included_other_files_is_not_kept(indexed, tmp_path, monkeypatch, name):
    """lmms-eval takes an included file from the working directory if there is one of its name."""
    there = tmp_path / "mine" / "here"
    there.mkdir(parents=True)
    monkeypatch.chdir(there)
    Path(name).touch()
    indexed()
    assert indexed()[1] == 2
    Path(name).unlink()
    assert indexed()[1] == 3 == indexed()[1]


def test_what_json_cannot_represent_is_not_kept(indexed):
    content = {"one": {"yaml_path": Path("one")}}
    assert indexed(content) == (content, 1) and indexed(content) == (content, 2)
    pairs = {1: "becomes text"}
    assert indexed(pairs) == (pairs, 3) and indexed(pairs) == (pairs, 4)


def test_without_a_cache_a_folder_is_read_each_time(folder, indexed, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("QVLM_CACHE", str(tmp_path / "file" / "cache"))
    assert indexed()[0] == indexed()[0] and indexed()[1] == 3


def test_the_harnesss_own_index_is_kept_as_it_is(folder):
    few = folder / "few"
    shutil.copytree(Path(lmms_eval.tasks.__file__).parent / "mmmu", few)
    manager = TaskManager.__new__(TaskManager)
    manager.logger = logger

    def index():
        return TaskManager._get_task_and_group(manager, str(few))

    first = kept_index(few, folder.parent / "utils.py", index)
    assert first == index() and "mmmu_val" in first
    assert kept_index(few, folder.parent / "utils.py", lambda: pytest.fail("read again")) == first


def test_the_harness_asks_for_it(monkeypatch):
    asked = []
    monkeypatch.setattr(tasks, "kept_index", lambda *arguments: asked.append(arguments) or {"mine": {}})
    index = tasks._caching_own_tasks(lambda manager, folder: pytest.fail("read"))
    own = Path(lmms_eval.tasks.__file__).parent
    assert index(None, str(own)) == index(None, str(own)) == {"mine": {}}
    ((folder, parser, _),) = asked
    assert folder == own and "def load_yaml_config" in parser.read_text()
