import json
from types import SimpleNamespace

import pytest
import torch
from lmms_eval.loggers.evaluation_tracker import EvaluationTracker
from lmms_eval.models.model_utils.gen_metrics import reset_logged_metrics
from lmms_eval.tasks.scienceqa.utils import sqa_process_results
from torch import nn

from qvlm_plugin.formats import ActivationFormat, WeightFormat
from qvlm_plugin.harness import provenance
from qvlm_plugin.harness.provenance import Counts, RunRecord
from qvlm_plugin.kernels.reference import REFERENCE
from qvlm_plugin.linear import QuantLinear


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


def test_packed_bytes_depend_on_formats_only():
    linear = nn.Linear(64, 8)
    formats = WeightFormat(kind="int", bits=4, group_size=32, symmetric=False), ActivationFormat()
    quantized = QuantLinear.from_linear(linear, *formats, {}, REFERENCE)
    model = nn.ModuleDict({"quantized": quantized, "norm": nn.LayerNorm(64), "tied": nn.Linear(64, 4, bias=False)})
    model["again"] = model["tied"]
    codes, scales, rest = 64 * 8 * 4, 16 * (16 + 4), 16 * (8 + 2 * 64 + 4 * 64)
    assert provenance.packed_bytes(model) == (codes + scales + rest) // 8
    assert provenance.packed_bytes(model.to(torch.bfloat16)) == (codes + scales + rest) // 8
    assert provenance.memory(model)["weight_bytes"] > 2 * 64 * 8


def test_memory_counts_shared_weights_once_and_held_bytes_only():
    model = nn.ModuleDict({"a": nn.Linear(8, 4, bias=False), "b": nn.Linear(8, 4, bias=False)})
    assert provenance.memory(model)["weight_bytes"] == 2 * 8 * 4 * 4
    model["b"].weight = model["a"].weight
    assert provenance.memory(model)["weight_bytes"] == 8 * 4 * 4
    model["a"].register_buffer("scale", torch.zeros(3, dtype=torch.float16))
    model["c"] = nn.Linear(100, 100, device="meta")
    measured = provenance.memory(model)
    assert measured["weight_bytes"] == 8 * 4 * 4 + 6
    assert measured["peak_memory_bytes"] > 10**7 and measured["peak_memory_of"] == "process"


def test_data_origin(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "org" / "data"
    folder.mkdir(parents=True)
    (folder / "test.parquet").write_bytes(b"one")
    config = {"dataset_path": "org/data", "dataset_name": "full", "test_split": "test"}
    local = provenance.data_origin(config, {})
    assert local["origin"] == "local" and not local["stand_in"] and local["split"] == "test"
    (folder / "stand_in.json").write_text("{}")
    assert provenance.data_origin(config, {})["stand_in"]
    (folder / "test.parquet").write_bytes(b"two")
    assert provenance.data_origin(config, {})["content_hash"] != local["content_hash"]

    revision = "0123456789abcdef0123456789abcdef01234567"
    cached = SimpleNamespace(cache_files=[{"filename": f"/cache/org___data/full/0.0.0/{revision}/data-test.arrow"}])
    hub = provenance.data_origin(config | {"dataset_path": "org/other"}, {"test": cached})
    assert (hub["origin"], hub["revision"], hub["stand_in"]) == ("hub", revision, False)
    assert provenance.data_origin(config | {"dataset_path": "org/other"}, {})["revision"] is None

    files = config | {"dataset_path": "parquet", "dataset_kwargs": {"data_files": {"test": "org/data/test.parquet"}}}
    assert provenance.data_origin(files, {})["origin"] == "local"


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
