import json

import pytest
from lmms_eval.loggers.evaluation_tracker import EvaluationTracker
from lmms_eval.models.model_utils.gen_metrics import reset_logged_metrics
from lmms_eval.tasks.scienceqa.utils import sqa_process_results
from torch import nn

from qvlm_plugin.harness import provenance
from qvlm_plugin.harness.provenance import Counts, RunRecord


@pytest.mark.parametrize(
    "answer",
    [
        "A",
        "b",
        " C ",
        "A.",
        "B. the lamp",
        "b. the lamp",
        "A lamp",
        "(A)",
        "",
        " ",
        "The answer is A",
        "1",
        "AB",
        "A\n",
    ],
)
def test_scienceqa_answers_are_unreadable_exactly_when_no_choice_could_score(answer):
    scores = [
        sqa_process_results({"choices": ["x"] * 5, "answer": target}, [answer])["exact_match"] for target in range(5)
    ]
    assert provenance.is_readable("scienceqa", answer) == (sum(scores) == 1.0)


def test_free_answers_are_unreadable_when_empty():
    assert provenance.is_readable("vqav2_val", "red")
    assert not provenance.is_readable("vqav2_val", " \n")


def make_record():
    facts = {"method": "none", "scheme": "w16a16", "bits": {}, "search_seconds": 0.0, "calibration": None}
    return RunRecord(facts, frozenset(), {})


def save(tmp_path, results):
    tracker = EvaluationTracker(output_path=str(tmp_path))
    tracker.general_config_tracker.log_experiment_args("m", "pretrained=m", None, None, None)
    tracker.save_results_aggregated(results, None, "now")
    return json.loads((tmp_path / "m" / "now_results.json").read_text())


def test_the_record_reaches_the_results_once_and_no_other_run(tmp_path):
    provenance.install()
    wrapped = EvaluationTracker.save_results_aggregated
    provenance.install()
    assert wrapped == EvaluationTracker.save_results_aggregated
    reset_logged_metrics()
    make_record().finish(nn.Linear(4, 4))
    written = save(tmp_path / "ours", {"configs": {}})
    assert written["qvlm"]["method"] == "none" and written["qvlm"]["weight_bytes"] == 80
    reset_logged_metrics()  # the harness does so at the start of each evaluation
    assert "qvlm" not in save(tmp_path / "theirs", {"configs": {}})


def test_counts_of_processes_add_up():
    one, two = Counts(tokens=3, seconds=2.0, compared={("a", 0, "")}), Counts(tokens=4, seconds=5.0, overlapping=["x"])
    one.generated["a"] += 2
    two.generated.update(a=1, b=1)
    two.found["b"] += 1
    total = Counts.total([one, two])
    assert (total.generated, total.found, total.tokens, total.seconds) == ({"a": 3, "b": 1}, {"b": 1}, 7, 5.0)
    assert (total.compared, total.overlapping) == ({("a", 0, "")}, ["x"])
