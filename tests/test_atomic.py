import os

import pytest
import torch
from safetensors.torch import save_file

from qvlm_plugin import atomic
from qvlm_plugin.atomic import make_folder, require_vacant, staged, write_file
from qvlm_plugin.errors import QVLMError


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def test_a_file_replaces_an_older_one_and_makes_its_folders(tmp_path):
    file = tmp_path / "a" / "b" / "file"
    for content in (b"one", b"two"):
        write_file(file, content)
        assert file.read_bytes() == content and names(file.parent) == ["file"]


def test_a_folder_is_there_at_the_end_only(tmp_path):
    with staged(tmp_path / "new") as folder:
        (folder / "file").write_bytes(b"1")
        assert not (tmp_path / "new").exists()
    assert names(tmp_path) == ["new"] and names(tmp_path / "new") == ["file"]
    (tmp_path / "empty").mkdir()
    with staged(tmp_path / "empty") as folder:
        (folder / "file").write_bytes(b"1")
    assert names(tmp_path / "empty") == ["file"]


def test_a_folder_in_use_is_replaced_only_on_request(tmp_path):
    for name in ("one", "two"):
        with staged(tmp_path / "folder", replaces=True) as folder:
            (folder / name).touch()
    assert names(tmp_path / "folder") == ["two"] and names(tmp_path) == ["folder"]
    with pytest.raises(QVLMError, match="folder' cannot be written"), staged(tmp_path / "folder"):
        pass
    assert names(tmp_path / "folder") == ["two"] and names(tmp_path) == ["folder"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_of_what_failed(tmp_path, error):
    def fail():
        with staged(tmp_path / "folder") as folder:
            (folder / "file").touch()
            raise error

    with pytest.raises(error):
        fail()
    assert names(tmp_path) == []


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    if (child := os.fork()) == 0:
        with staged(tmp_path / "x"):
            os._exit(9)  # without any clean-up
    os.waitpid(child, 0)
    (left,) = names(tmp_path)
    with staged(tmp_path / "y") as other:  # another name
        assert names(tmp_path) == sorted([left, other.name])
        with staged(tmp_path / "x", replaces=True) as first:
            assert names(tmp_path) == sorted([first.name, other.name]) and first.name != left
            with staged(tmp_path / "x", replaces=True) as second:
                assert names(tmp_path) == sorted([first.name, other.name, second.name])
    assert names(tmp_path) == ["x", "y"]


def test_a_leftover_that_goes_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    made, flock = [], atomic.fcntl.flock

    def lock_too_late(descriptor, operation):
        if operation == atomic.fcntl.LOCK_EX and not made:
            made.append(next(tmp_path.iterdir()))
            made[0].rmdir()
        flock(descriptor, operation)

    monkeypatch.setattr(atomic.fcntl, "flock", lock_too_late)
    with staged(tmp_path / "folder") as folder:
        assert folder not in made
    assert names(tmp_path) == ["folder"]


def test_what_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    for write in (make_folder, lambda path: write_file(path, b""), lambda path: staged(path).__enter__()):
        with pytest.raises(QVLMError, match="cannot be written") as caught:
            write(tmp_path / "file" / "inner")
        assert "\n" not in str(caught.value)
    with pytest.raises(QVLMError, match="is not an empty folder"):
        require_vacant(tmp_path / "file")
    require_vacant(tmp_path / "new")


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o002])
def test_permissions_follow_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        write_file(tmp_path / "file", b"1")
        with staged(tmp_path / "folder") as folder:
            (folder / "inner").mkdir(mode=0o700)
            save_file({"x": torch.ones(1)}, folder / "inner" / "model.safetensors")
            (folder / "inner" / "model.safetensors").chmod(0o600)  # as some versions of safetensors do
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    modes = {file.name: file.stat().st_mode & 0o777 for file in tmp_path.rglob("*")}
    files, folders = 0o666 & ~mask, 0o777 & ~mask
    assert modes == {"file": files, "folder": folders, "inner": folders, "model.safetensors": files}
