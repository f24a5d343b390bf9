import sys

from qvlm_plugin.cache import sources_digest


def test_the_digest_of_a_package_follows_each_of_its_files(tmp_path, monkeypatch):
    package = tmp_path / "a_method"
    (package / "parts").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "parts" / "search.py").write_text("depth = 3")
    monkeypatch.syspath_prepend(tmp_path)
    __import__("a_method")
    first = sources_digest("a_method")
    assert sources_digest("a_method") == first != sources_digest("qvlm_plugin")
    (package / "parts" / "search.py").write_text("depth = 4")
    assert sources_digest("a_method") != first
    (package / "parts" / "search.py").write_text("depth = 3")
    assert sources_digest("a_method") == first
    (package / "parts" / "more.py").touch()
    assert sources_digest("a_method") != first
    del sys.modules["a_method"]


def test_modules_without_files_have_a_digest():
    assert sources_digest("sys") == sources_digest("builtins")
