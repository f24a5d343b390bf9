import unicodedata

import pytest

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.reading import inside, one_line, parse_json, parsed_elsewhere, read_json


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[" * 3_000,
        '{"a": ' * 3_000,
        "7" * 5_000,
        '"\\ud800"',
        '["\\uDC00\\uD800"]',
        b"\xff",
        b'"\xed\xa0\x80"',
    ],
)
def test_what_is_no_json_is_a_value_error(text):
    with pytest.raises(ValueError):
        parse_json(text)


@pytest.mark.parametrize(
    "text, value",
    [
        ('{"a": [1, null]}', {"a": [1, None]}),
        (b"\xef\xbb\xbf1", 1),
        ('"\\ud83d\\ude00"', "😀"),
        ('"\\\\ud800"', "\\ud800"),
    ],
)
def test_json_is_what_it_says(text, value):
    assert parse_json(text) == value


def test_files(tmp_path):
    (tmp_path / "a.json").write_text('{"ä": 1}', encoding="utf-8")
    assert read_json(tmp_path / "a.json") == {"ä": 1}
    with pytest.raises(OSError):
        read_json(tmp_path / "missing.json")


def test_errors_of_other_libraries_become_one_line():
    with pytest.raises(QVLMError, match=r"^it fails: 'a b'$"), parsed_elsewhere("it fails"):
        raise KeyError("a b")
    with pytest.raises(QVLMError, match=r"^as it was$"), parsed_elsewhere("it fails"):
        raise QVLMError("as it was")
    assert one_line(ValueError("a\n  b")) == "a b" and one_line(ValueError()) == "ValueError"
    assert len(one_line(ValueError("x" * 1_000))) == 300


@pytest.mark.parametrize("written, named", [("NFC", "NFD"), ("NFD", "NFC"), ("NFC", "NFC")])
def test_a_name_finds_its_file_in_either_normal_form(tmp_path, written, named):
    file = tmp_path / unicodedata.normalize(written, "Bü.ro") / unicodedata.normalize(written, "Größe é.png")
    file.parent.mkdir()
    file.touch()
    name = unicodedata.normalize(named, "Bü.ro/Größe é.png")
    assert inside(tmp_path, name, "rows.json") == file


def test_a_file_that_there_is_not_keeps_its_name(tmp_path):
    for name in ("é.png", "e\u0301.png", "x" * 5_000):
        assert inside(tmp_path, name, "rows.json") == tmp_path / name
    with pytest.raises(QVLMError, match=r"rows.json: '../x' is not the name of a file"):
        inside(tmp_path, "../x", "rows.json")
