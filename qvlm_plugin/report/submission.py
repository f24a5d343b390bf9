"""Check submissions to the official test servers, as the harness's test tasks write them.

VQA-v2 (https://visualqa.org/evaluation.html): a list of {"question_id": int, "answer": str}, each question once.
VizWiz-VQA (https://vizwiz.org/tasks-and-datasets/vqa/): a list of {"image": "VizWiz_test_00000000.jpg", "answer": str}.
Both servers require one file that answers every question of the split.
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
    """The format that a server accepts.

    Attributes:
        benchmark: name of the benchmark.
        key: name of the entry that identifies the question.
        is_key: whether a value is a valid key.
        expected: description of a valid key, for errors.
        count: number of questions in the test split.
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
    """Check a submission file; returns its format and the number of its answers.

    Raises:
        QVLMError: no server accepts it; the message names the faulty entry.
    """
    try:
        entries = read_json(file)
    except (OSError, ValueError) as error:
        raise QVLMError(f"{file} is not a JSON file: {error}") from error
    if not isinstance(entries, list) or not entries or not isinstance(entries[0], dict):
        raise QVLMError(f"{file} is not a list of answers")
    found = next((server for server in FORMATS if server.key in entries[0]), None)
    if found is None:
        keys = " or ".join(server.key for server in FORMATS)
        raise QVLMError(f"{file} is not a submission to VizWiz-VQA or VQA-v2: its first entry has no {keys}")
    seen = set()
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict) or entry.keys() != {found.key, "answer"}:
            raise QVLMError(f"{file}: entry {number} must have {found.key} and answer only")
        key, answer = entry[found.key], entry["answer"]
        if not found.is_key(key):
            raise QVLMError(f"{file}: entry {number}: {found.key} is {key!r}; it must be {found.expected}")
        if not isinstance(answer, str):
            raise QVLMError(f"{file}: entry {number}: answer is {answer!r}; it must be text")
        if key in seen:
            raise QVLMError(f"{file}: entry {number} answers {key!r} a second time")
        seen.add(key)
    return found, len(entries)
