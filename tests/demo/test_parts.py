import hashlib
import zipfile

import pytest

from qvlm_plugin.demo import parts
from qvlm_plugin.demo.parts import Part, locate
from qvlm_plugin.errors import QVLMError


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """An empty cache, and a folder that is all pip can download from."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("QVLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    locate.cache_clear()
    yield folder
    locate.cache_clear()


def toy_wheel(folder, word="hello"):
    """A wheel with one data file, and its Part."""
    name = "qvlm_toy_part"
    wheel = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{name}/word.txt", word)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return Part(distribution="qvlm-toy-part", version="1.0", sha256=digest, package=name, license="MIT")


def test_fetches_the_wheel_once_and_reads_inside_it(shop):
    part = toy_wheel(shop)
    assert (locate(part) / "word.txt").read_text() == "hello"
    (shop / part.wheel).unlink()
    locate.cache_clear()
    assert (locate(part) / "word.txt").read_text() == "hello"


def test_a_damaged_cached_wheel_is_fetched_again(shop, tmp_path):
    part = toy_wheel(shop)
    locate(part)
    locate.cache_clear()
    (tmp_path / "cache" / "wheels" / part.wheel).write_bytes(b"cut off")
    assert (locate(part) / "word.txt").read_text() == "hello"


def test_a_wheel_of_another_hash_is_refused(shop, tmp_path):
    part = toy_wheel(shop)
    toy_wheel(shop, word="changed")
    with pytest.raises(QVLMError, match=r"qvlm-toy-part==1\.0"):
        locate(part)
    assert not list((tmp_path / "cache" / "wheels").glob("*.whl"))


def test_without_an_index_the_error_names_the_remedy(shop, tmp_path):
    with pytest.raises(QVLMError, match=r"put easy_vqa-1\.0-py3-none-any\.whl from PyPI into") as caught:
        locate(parts.QUESTIONS)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "cache" / "wheels") in str(caught.value)


@pytest.mark.parametrize(("version", "word"), [("1.0", "installed"), ("2.0", "hello")])
def test_an_installed_distribution_is_used_if_it_is_the_pinned_version(shop, tmp_path, monkeypatch, version, word):
    part = toy_wheel(shop)
    site = tmp_path / "site"
    (site / part.package).mkdir(parents=True)
    (site / part.package / "word.txt").write_text("installed")
    info = site / f"{part.package}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {part.distribution}\nVersion: {version}\n")
    monkeypatch.syspath_prepend(str(site))
    assert (locate(part) / "word.txt").read_text() == word
