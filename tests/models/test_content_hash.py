import hashlib
import os

import pytest

from qvlm_plugin.cache import _entry
from qvlm_plugin.models import content_hash as module
from qvlm_plugin.models.content_hash import content_hash


@pytest.fixture
def read(monkeypatch, tmp_path):
    """The sizes of the files that were hashed, with a cache of the test's own; files of 10 bytes are large."""
    sizes, digest_of = [], hashlib.file_digest

    def counted(stream, name):
        sizes.append(os.fstat(stream.fileno()).st_size)
        return digest_of(stream, name)

    monkeypatch.setattr(module, "LARGE", 10)
    monkeypatch.setattr(hashlib, "file_digest", counted)
    monkeypatch.setenv("QVLM_CACHE", str(tmp_path / "cache"))
    return sizes


@pytest.fixture
def later(monkeypatch):
    """Lets all files be a minute old."""
    now = module.time.time
    monkeypatch.setattr(module.time, "time", lambda: now() + 60)


@pytest.fixture
def weights(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"weights" * 10)
    return file


def plain(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_file_is_read_once(read, later, weights, tmp_path):
    first = content_hash(weights)
    assert first == plain(weights) == content_hash(weights) and read == [70]
    (tmp_path / "link").symlink_to(weights)
    assert content_hash(tmp_path / "link") == first and read == [70]
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(weights.read_bytes())
    assert content_hash(copy) == first and read == [70, 70]
    (entry, other) = (tmp_path / "cache" / "hashes").iterdir()
    assert entry.stat().st_size < 300 and other != entry


def test_small_files_and_blobs_of_the_hub_are_not_kept(read, later, tmp_path):
    small = tmp_path / "config.json"
    small.write_bytes(b"{}")
    assert content_hash(small) == content_hash(small) == plain(small) and read == [2, 2]
    blob = tmp_path / ("ab" * 32)
    blob.write_bytes(b"weights" * 10)
    assert content_hash(blob) == blob.name and read == [2, 2]
    assert not (tmp_path / "cache").exists()


def rewritten(file):
    file.write_bytes(b"WEIGHTS" * 10)


def rewritten_with_its_old_time(file):
    state = file.stat()
    file.write_bytes(b"WEIGHTS" * 10)
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))


def replaced_by_one_of_its_age(file):
    other = file.with_name("other")
    other.write_bytes(b"WEIGHTS" * 10)
    os.utime(other, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
    other.replace(file)


def grown(file):
    with file.open("ab") as stream:
        stream.write(b"more")


@pytest.mark.parametrize("change", [rewritten, rewritten_with_its_old_time, replaced_by_one_of_its_age, grown])
def test_a_changed_file_is_read_again(read, later, weights, change):
    before = content_hash(weights)
    change(weights)
    after = content_hash(weights)
    assert after == plain(weights) != before and len(read) == 2
    assert content_hash(weights) == after and len(read) == 2


def test_a_file_that_has_just_changed_is_not_kept(read, weights, monkeypatch):
    changed = weights.stat().st_mtime
    for age, times in ((-60, 1), (0, 2), (1.9, 3), (2.5, 4), (2.5, 4)):
        monkeypatch.setattr(module.time, "time", lambda age=age: changed + age)
        assert content_hash(weights) == plain(weights) and len(read) == times


def test_a_file_that_changes_while_it_is_read_is_not_kept(read, later, weights, monkeypatch):
    digest_of = hashlib.file_digest

    def slow(stream, name):
        digest = digest_of(stream, name)
        grown(weights)
        return digest

    with monkeypatch.context() as patch:
        patch.setattr(hashlib, "file_digest", slow)
        content_hash(weights)
    assert content_hash(weights) == plain(weights) and len(read) == 2


@pytest.mark.parametrize(
    "damage", [lambda blob: b"", lambda blob: blob[:-3], lambda blob: b"\xff" + blob[1:], lambda blob: b"{}\n" * 9]
)
def test_a_damaged_entry_is_written_anew(read, later, weights, tmp_path, damage):
    content_hash(weights)
    (entry,) = (tmp_path / "cache" / "hashes").iterdir()
    whole = entry.read_bytes()
    entry.write_bytes(damage(whole))
    assert content_hash(weights) == plain(weights) and len(read) == 2
    assert entry.read_bytes() == whole


def test_no_flipped_digit_of_an_entry_gives_another_hash(read, later, weights, tmp_path):
    content_hash(weights)
    (entry,) = (tmp_path / "cache" / "hashes").iterdir()
    whole = entry.read_bytes()
    for place in range(0, len(whole), 7):
        entry.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert content_hash(weights) == plain(weights)


@pytest.mark.parametrize("obstacle", ["a file", "a folder that is an entry", "no home"])
def test_a_cache_that_cannot_be_written_costs_time_only(read, later, weights, tmp_path, monkeypatch, obstacle):
    if obstacle == "a file":
        (tmp_path / "cache").touch()
    elif obstacle == "no home":
        monkeypatch.delenv("QVLM_CACHE")
        monkeypatch.setattr("pathlib.Path.home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    else:
        _entry("hashes", weights.resolve()).mkdir(parents=True)
    assert content_hash(weights) == content_hash(weights) == plain(weights) and len(read) == 2
