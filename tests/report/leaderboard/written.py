"""Results and samples files in lmms-eval's layout, as many and as wrong as a test wants them."""

import json

from qvlm_plugin.report.seal import seal

DATA = {"dataset": "org/Quiz", "config": None, "split": "test", "origin": "hub", "revision": "a" * 40}


def provenance(method="rtn", scheme="w4a4", **changes):
    return {
        "method": method,
        "scheme": scheme,
        "options": {},
        "bits": {"decoder": {"weight": float(scheme[1:].partition("a")[0]), "activation": 4.0}},
        "plan_hash": f"plan of {method} {scheme}".ljust(64, "0"),
        "table_hash": "0" * 64,
        "model_fingerprint": "f" * 64,
        "backend": "reference",
        "calibration": None,
        "search_seconds": 3.5,
        "pretrained": "org/model",
        "versions": {"torch": "2.15.0"},
        "data": {"quiz": {**DATA, "stand_in": False}},
        "stand_in": False,
        "packed_bytes": 4_000_000,
        "weight_bytes": 4_100_000,
        "peak_memory_bytes": 9_000_000,
        **changes,
    }


def samples(scores, metric="exact_match", **more):
    return [
        {
            "doc_id": index,
            "target": "red",
            "filtered_resps": "red" if score else "blue",
            "doc_hash": "0" * 64,
            "input_media": [],
            metric: float(score),
            "input": f"question {index}",
            **more,
        }
        for index, score in enumerate(scores)
    ]


def content(scores, qvlm=None, *, task="quiz", total=None, metrics=None, **changes):
    """A results file's JSON object.

    Args:
        scores: of the documents, by the first metric.
        qvlm: provenance; None for another package's model.
        task: the only one.
        total: documents it has, if more.
        metrics: further metrics' values.
        changes: to the object.
    """
    named = {"exact_match": sum(scores) / len(scores), **(metrics or {})}
    listed = [{"metric": name, "aggregation": "mean", "higher_is_better": name != "parse_failure"} for name in named]
    whole = {
        "results": {
            task: {"alias": task}
            | {f"{name},none": value for name, value in named.items()}
            | {f"{name}_stderr,none": 0.02 for name in named}
        },
        "n-samples": {task: {"original": total or len(scores), "effective": len(scores)}},
        "configs": {
            task: {
                "dataset_path": "org/Quiz",
                "test_split": "test",
                "doc_to_text": "<function ask at 0x7f0000000000>",
                "metric_list": listed,
                "lmms_eval_specific_kwargs": {"default": {"post_prompt": "?"}, "post_prompt": "?"},
                "generation_kwargs": {"max_new_tokens": 16},
            }
        },
        "versions": {task: 1.0},
        "higher_is_better": {task: {name: name != "parse_failure" for name in named}},
        "throughput": {"avg_speed": 40.0},
        "config": {"model": "qvlm_llava" if qvlm else "other", "model_args": "", "limit": None, "offset": 0},
        "model_name": "org/model",
        "date": "20261121_120000",
        **changes,
    }
    if qvlm:
        whole["qvlm"] = dict(qvlm)
        whole["qvlm"]["seal"] = seal(json.loads(json.dumps(whole)))
    return whole


def write(folder, whole, rows=None, *, task="quiz"):
    """Write a results file, and a samples file unless ``rows`` is None; returns the former."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{whole['date']}_results.json"
    file.write_text(json.dumps(whole))
    if rows is not None:
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{whole['date']}_samples_{task}.jsonl").write_text(lines)
    return file


def write_run(folder, scores, qvlm=None, *, task="quiz", **changes):
    """A run whose results and samples agree."""
    return write(folder, content(scores, qvlm, task=task, **changes), samples(scores), task=task)
