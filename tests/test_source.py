import subprocess

from qvlm_plugin.source import source_commit


def git(folder, *words):
    run = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *words]
    return subprocess.run(run, check=True, capture_output=True, text=True).stdout.strip()


def test_a_checkout_tells_its_commit_and_whether_it_was_changed(tmp_path):
    (tmp_path / "file").write_text("1")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message", "first")
    git(tmp_path, "tag", "v1")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert source_commit(tmp_path) == commit
    (tmp_path / "file").write_text("2")
    assert source_commit(tmp_path) == f"{commit}-dirty"


def test_elsewhere_it_is_not_known(tmp_path):
    assert source_commit(tmp_path, "no-such-package") is None
    assert source_commit(tmp_path, "pydantic") is None  # from an index
    (tmp_path / ".git").write_text("gitdir: /nowhere\n")
    assert source_commit(tmp_path) is None


def test_pip_tells_the_commit_of_an_address(tmp_path, monkeypatch):
    folder = tmp_path / "theirs-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (folder / "direct_url.json").write_text('{"url": "https://x/y", "vcs_info": {"vcs": "git", "commit_id": "abc"}}')
    monkeypatch.syspath_prepend(tmp_path)
    assert source_commit(tmp_path / "nowhere", "theirs") == "abc"
    (folder / "direct_url.json").write_text('{"url": "file:///x", "dir_info": {"editable": true}}')
    assert source_commit(tmp_path / "nowhere", "theirs") is None
