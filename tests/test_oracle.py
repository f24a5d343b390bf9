"""The oracle of the joint search: it sees the answers' loss, and never makes that larger."""

import pytest
import torch
from test_docs import DOCS
from tiny_llava import random_image

from qvlm_plugin import planning
from qvlm_plugin.calibration import CalibrationSet, Sample
from qvlm_plugin.conversation import Conversation
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.linear import QuantLinear
from qvlm_plugin.methods.hidden import block_inputs
from qvlm_plugin.models.loading import load
from qvlm_plugin.plan_request import check_request
from qvlm_plugin.reading import read_json


@pytest.fixture
def oracle(benchmark_module):
    return benchmark_module("oracle")


@pytest.fixture
def samples():
    given = (Sample(Conversation.from_prompt("what? " * (1 + i), [random_image(i)]), f"answer {i}") for i in range(10))
    return CalibrationSet(tuple(given))


def loss_of(oracle, loaded, samples):
    context = oracle.context_of(loaded, samples)
    hidden = block_inputs(context)
    for named in context.layers:
        hidden = hidden.through(*named)
    return oracle.answers_of(loaded, samples).loss(hidden)


@torch.no_grad()
def test_the_loss_is_that_of_the_whole_model(oracle, loaded, samples):
    total, count = 0.0, 0
    for inputs, answer in samples.batches(loaded.processor, 1):
        logits = loaded.model(**inputs).logits[:, :-1][answer[:, 1:]]
        total += float(torch.nn.functional.cross_entropy(logits, inputs["input_ids"][answer], reduction="sum"))
        count += int(answer.sum())
    assert loss_of(oracle, loaded, samples) == pytest.approx(total / count, rel=1e-4)


def test_each_layer_gets_the_percentile_of_the_least_loss(oracle, loaded, samples):
    """Of two layers, the first is chosen with the second as it was, by trying all."""
    request = check_request("quarot", "w4a4", {"calibration_batch_size": 5})
    planning.apply(planning.obtain_plan(loaded, request, samples, None), loaded)
    percentiles = [0.3, 1.0, 0.8, 0.6]
    layers = loaded.model.model.language_model.layers

    @torch.no_grad()
    def loss_with(*chosen):
        for layer, percentile in zip(layers, chosen, strict=True):
            for one in layer.modules():
                if isinstance(one, QuantLinear):
                    one.clip_ratio.fill_(percentile)
        return loss_of(oracle, loaded, samples)

    first = min(percentiles, key=lambda p: loss_with(p, 1.0))
    second = min(percentiles, key=lambda p: loss_with(first, p))
    expected = loss_with(first, second)
    loss_with(1.0, 1.0)
    assert [*oracle.choose(loaded, samples, percentiles)] == [first, second]
    assert loss_of(oracle, loaded, samples) == pytest.approx(expected)
    loss_with(1.0, 1.0)
    assert [*oracle.choose(loaded, samples, percentiles, [first])] == [first, second]
    assert loss_of(oracle, loaded, samples) == pytest.approx(expected)


def test_what_is_known_is_kept_and_other_arguments_are_refused(oracle, tmp_path):
    kept = oracle.Kept.of(tmp_path / "oracle.json", {"limit": 60, "percentiles": [1.0]})
    kept.rows["full precision"] = ("0.1", "99.0")
    kept.chosen.append(0.9)
    kept.write()
    again = oracle.Kept.of(kept.file, kept.asked)
    assert again.chosen == [0.9] and [*again.rows["full precision"]] == ["0.1", "99.0"]
    with pytest.raises(QVLMError, match="written with other arguments"):
        oracle.Kept.of(kept.file, {"limit": 61, "percentiles": [1.0]})


def test_an_interrupted_run_resumes_and_ends_the_same(oracle, tiny_llava, samples, tmp_path, monkeypatch):
    """The second call measures only what the first had not, and chooses only the last layer."""
    request = check_request("quarot", "w4a4", {"calibration_batch_size": 5})
    plan = planning.obtain_plan(load(str(tiny_llava), dtype="float32"), request, samples, None)
    monkeypatch.setattr(oracle, "resolve_demo", lambda _: str(tiny_llava))
    monkeypatch.setattr(oracle, "read_calibration", lambda *_: samples)
    monkeypatch.setattr(CalibrationSet, "without", lambda own, _: own.samples)
    monkeypatch.setattr(oracle, "read_questions", lambda *_: [])
    times = []
    monkeypatch.setattr(oracle, "measured", lambda *_: times.append(1) or (str(len(times)), ""))
    asked = {"samples": 10, "limit": 60, "percentiles": [1.0, 0.5]}
    whole = oracle.Kept.of(tmp_path / "whole.json", asked)
    oracle.compare(whole, {tmp_path / "plan": plan})
    assert [*whole.rows] == ["full precision", "plan", "plan, oracle"] and len(times) == 3 and len(whole.chosen) == 2
    part = oracle.Kept(tmp_path / "part.json", asked, {"full precision": (), "plan": ()}, whole.chosen[:1])
    oracle.compare(part, {tmp_path / "plan": plan})
    assert part.chosen == whole.chosen and len(times) == 4


def test_the_documents_table_is_that_of_the_runs_that_are_kept():
    page, files = (DOCS / "results-paper.md").read_text(), [*(DOCS / "ablations").glob("oracle-*.json")]
    assert len(files) == 2
    for file in files:
        kept = read_json(file)
        rows = [f"| {' | '.join((name, *texts))} |" for name, texts in kept["rows"].items()]
        assert len(rows) >= 3 and all(row in page for row in rows)
        same = sum(percentile == 1 for percentile in kept["chosen"])
        assert f"{same} of the 30 layers" in page or f"{same} of\n  30 layers" in page
