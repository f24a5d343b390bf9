import json

import pytest

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.report.submission import check_submission

VIZWIZ = [{"image": f"VizWiz_test_{index:08}.jpg", "answer": "a cup"} for index in range(3)]
VQA = [{"question_id": index, "answer": "yes"} for index in range(4)]


def check(tmp_path, content):
    file = tmp_path / "submission.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return check_submission(file)


def test_both_formats(tmp_path):
    found, count = check(tmp_path, VIZWIZ)
    assert (found.benchmark, count) == ("VizWiz-VQA", 3)
    found, count = check(tmp_path, VQA)
    assert (found.benchmark, count) == ("VQA-v2", 4)


@pytest.mark.parametrize(
    "content, message",
    [
        ("[", "is not a JSON file"),
        ([], "is not a list of answers"),
        ({"question_id": 1}, "is not a list of answers"),
        ([{"id": 1, "answer": "x"}], "its first entry has no image or question_id"),
        ([*VIZWIZ, VIZWIZ[0]], "entry 3 answers 'VizWiz_test_00000000.jpg' a second time"),
        ([{"image": "VizWiz_val_00000000.jpg", "answer": "x"}], "it must be VizWiz_test_"),
        ([*VQA, {"question_id": "9", "answer": "x"}], "entry 4: question_id is '9'; it must be a whole number"),
        ([*VQA, {"question_id": 9, "answer": None}], "entry 4: answer is None; it must be text"),
        ([*VQA, {"question_id": 9, "answer": "x", "score": 1}], "entry 4 must have question_id and answer"),
    ],
)
def test_invalid_submissions_are_refused(tmp_path, content, message):
    with pytest.raises(QVLMError, match=message):
        check(tmp_path, content)
