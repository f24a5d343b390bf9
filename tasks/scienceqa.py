"""ScienceQA by question class, and LLaVA v1.3's protocol with generated explanations (QCM-LEPA).

The classes are those of ScienceQA's authors, as in the paper's Table 2: subject, kind of context, grade.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lmms_eval.tasks.scienceqa.utils import sqa_doc_to_target, sqa_process_results

SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}

ANSWER = re.compile(r"(?:ANSWER:|The answer is)\s*\(?([A-Z])\b")
"""The end of an explained answer, as LLaVA's 7B checkpoint or its 13B checkpoint writes it."""


def classes(doc: Mapping[str, Any]) -> list[str]:
    """Names of the question classes that a document belongs to."""
    has_text, has_image = bool(doc["hint"].strip()), doc["image"] is not None
    found = [SUBJECTS[doc["subject"]]] if doc["subject"] in SUBJECTS else []
    found += ["TXT"] * has_text + ["IMG"] * has_image + ["NO"] * (not has_text and not has_image)
    if grade := re.fullmatch(r"grade(\d+)", doc["grade"]):
        found.append("G1-6" if int(grade[1]) <= 6 else "G7-12")
    return found


def results(doc: Mapping[str, Any], answers: Sequence[str]) -> dict[str, float]:
    """The harness's score of the answered letter, also by class; and whether the scorer finds a letter at all."""
    score = sqa_process_results(doc, answers)["exact_match"]
    letters = ({"choices": ["?"] * 26, "answer": index} for index in range(26))
    readable = any(sqa_process_results(letter, answers)["exact_match"] for letter in letters)
    return _metrics(doc, score, readable)


def explained_prompt(doc: Mapping[str, Any], lmms_eval_specific_kwargs: Mapping[str, Any] | None = None) -> str:
    """Question, context and multiple options (QCM); the model adds lecture, explanation and answer (LEPA)."""
    options = " ".join(f"({chr(65 + index)}) {choice}" for index, choice in enumerate(doc["choices"]))
    text = f"{doc['question']}\nContext: {doc['hint'].strip() or 'N/A'}\nOptions: {options}"
    return text.replace("  ", " ").strip()


def explained_answer(text: str) -> str | None:
    """The last letter that an explained answer states; None where it states none."""
    letters = ANSWER.findall(text)
    return letters[-1] if letters else None


def explained_results(doc: Mapping[str, Any], answers: Sequence[str]) -> dict[str, float]:
    """Accuracy of the letter at the end, also by class; and whether there is one."""
    answer = explained_answer(answers[0])
    return _metrics(doc, float(answer == sqa_doc_to_target(doc)), answer is not None)


def _metrics(doc: Mapping[str, Any], score: float, readable: bool) -> dict[str, float]:
    # ``score`` is no metric of the tasks, but the harness's paired statistics read it from the logged samples.
    return {
        "exact_match": score,
        "score": score,
        "parse_failure": float(not readable),
        **dict.fromkeys(classes(doc), score),
    }
