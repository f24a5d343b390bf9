"""Answers for the official test servers: what the harness's test tasks write, checked before it is sent.

VQA-v2 (https://visualqa.org/evaluation.html): a list of {"question_id": int, "answer": str}, a question once.
VizWiz-VQA (https://vizwiz.org/tasks-and-datasets/vqa/): a list of {"image": "VizWiz_test_00000000.jpg", "answer": str}.
Both servers want an answer to every question of the split, in one file.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.reading import read_json


@dataclass(frozen=True)
class Format:
    """What a server accepts.

    Attributes:
        benchmark: its name.
        key: what names the question.
        is_key: whether a value is one.
        expected: how the error says what is one.
        count: questions of the whole test split.
    """

    benchmark: str
    key: str
    is_key: Callable[[Any], bool]
    expected: str
    count: int


def _is_test_image(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"VizWiz_test_\d{8}\.jpg", value) is not None


def _is_question_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


FORMATS = (
    Format("VizWiz-VQA", "image", _is_test_image, "VizWiz_test_ with 8 digits and .jpg", 8_000),
    Format("VQA-v2", "question_id", _is_question_id, "a whole number", 447_793),
)


def check_submission(file: Path) -> tuple[Format, int]:
    """Check a submission file; returns its format and how many answers it has.

    Raises:
        QVLMError: it is not what a server accepts; the message names the entry.
    """
    try:
        entries = read_json(file)
    except (OSError, ValueError) as error:
        raise QVLMError(f"{file} is not a JSON file: {error}") from error
    if not isinstance(entries, list) or not entries or not isinstance(entries[0], dict):
        raise QVLMError(f"{file} is no list of answers")
    found = next((one for one in FORMATS if one.key in entries[0]), None)
    if found is None:
        keys = " or ".join(one.key for one in FORMATS)
        raise QVLMError(f"{file}: its first entry has neither {keys}: no submission to VizWiz-VQA or VQA-v2")
    seen = set()
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict) or entry.keys() != {found.key, "answer"}:
            raise QVLMError(f"{file}: entry {number} must have {found.key} and answer, and nothing else")
        key, answer = entry[found.key], entry["answer"]
        if not found.is_key(key):
            raise QVLMError(f"{file}: entry {number}: {found.key} is {key!r}; it must be {found.expected}")
        if not isinstance(answer, str):
            raise QVLMError(f"{file}: entry {number}: answer is {answer!r}; it must be text")
        if key in seen:
            raise QVLMError(f"{file}: entry {number} answers {key!r} again")
        seen.add(key)
    return found, len(entries)
