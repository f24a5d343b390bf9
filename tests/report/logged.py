"""Runs as lmms-eval logs them, written by lmms-eval's own writer."""

from lmms_eval.loggers.evaluation_tracker import EvaluationTracker
from lmms_eval.models.model_utils.gen_metrics import reset_logged_metrics


def sample(index, score, answer="red", *, target="red", question=None, metric="exact_match", **fields):
    """What the evaluator hands to the writer for one document."""
    return {
        "doc_id": index,
        "doc": {"question": "what?"},
        "target": target,
        "arguments": [question or f"question {index}", {"max_new_tokens": 16}],
        "resps": [[answer]],
        "filtered_resps": [answer],
        "token_counts": [{"input_tokens": 3, "output_tokens": 2}],
        "doc_hash": "0" * 64,
        "input_media": [],
        metric: score,
        **fields,
    }


def write_run(folder, tasks, *, qvlm=None, stamp="20261121_120000", log_samples=True):
    """Write ``folder/model/…`` for samples by task; returns the results file."""
    reset_logged_metrics()  # as an evaluation does when it begins: the record of an earlier one is not this run's
    tracker = EvaluationTracker(output_path=str(folder))
    tracker.general_config_tracker.log_experiment_args("qvlm_llava", "pretrained=model", "", "", False)
    results = {
        "results": {task: {"alias": task, "exact_match,none": 0.5} for task in tasks},
        "n-samples": {task: {"original": len(rows), "effective": len(rows)} for task, rows in tasks.items()},
    }
    tracker.save_results_aggregated(results | ({"qvlm": qvlm} if qvlm else {}), tasks, stamp)
    if log_samples:
        for task, rows in tasks.items():
            tracker.save_results_samples(task, rows)
    return folder / "model" / f"{stamp}_results.json"


def scored(scores, answers=None):
    """The samples of a task whose documents have these scores."""
    return [sample(index, score, (answers or {}).get(index, "red")) for index, score in enumerate(scores)]
