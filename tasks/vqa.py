"""VizWiz-VQA and VQA-v2 by answer type, with the harness's own scores."""

from collections.abc import Mapping, Sequence
from typing import Any

from lmms_eval.tasks.vizwiz_vqa.utils import vizwiz_vqa_process_results
from lmms_eval.tasks.vqav2.utils import vqav2_process_results_val

ANSWER_TYPES = {"yes/no": "yes_no", "number": "number", "other": "other", "unanswerable": "unanswerable"}


def vizwiz_results(doc: Mapping[str, Any], answers: Sequence[str]) -> dict[str, float]:
    """The harness's score of a VizWiz answer, also by answer type."""
    return _metrics(float(vizwiz_vqa_process_results(doc, answers)["exact_match"]), doc["category"])


def vqav2_results(doc: Mapping[str, Any], answers: Sequence[str]) -> dict[str, float]:
    """The harness's score of a VQA-v2 answer, also by answer type."""
    return _metrics(float(vqav2_process_results_val(doc, answers)["exact_match"]), doc["answer_type"])


def _metrics(score: float, answer_type: str | None) -> dict[str, float]:
    # ``score`` is no metric of the tasks, but the harness's paired statistics read it from the logged samples.
    by_type = {ANSWER_TYPES[answer_type]: score} if answer_type in ANSWER_TYPES else {}
    return {"exact_match": score, "score": score, **by_type}
