import pytest
import torch

from qvlm_plugin.workspace import Workspace


def test_steps_are_recalled_as_they_were_kept(tmp_path):
    workspace = Workspace(tmp_path / "steps")
    assert workspace.recall("one") is None
    workspace.keep("one", {"choices": [1, 2], "error": 0.1}, {"a/b": torch.arange(3.0)})
    workspace.keep("two", {})
    data, tensors = Workspace(tmp_path / "steps").recall("one")
    assert data == {"choices": [1, 2], "error": 0.1} and torch.equal(tensors["a/b"], torch.arange(3.0))
    assert workspace.recall("two") == ({}, {})
    workspace.discard()
    assert workspace.recall("one") is None and not (tmp_path / "steps").exists()


def test_without_a_folder_nothing_is_kept():
    workspace = Workspace()
    workspace.keep("one", {"a": 1})
    assert workspace.recall("one") is None
    workspace.discard()


@pytest.mark.parametrize("content", [b"", b"rubbish" * 10, b"\x02\x00\x00\x00\x00\x00\x00\x00{}"])
def test_what_was_not_stored_whole_is_done_again(tmp_path, content):
    workspace = Workspace(tmp_path)
    (tmp_path / "one.safetensors").write_bytes(content)
    assert workspace.recall("one") is None
    workspace.keep("one", {"a": 1})
    assert workspace.recall("one") == ({"a": 1}, {})
