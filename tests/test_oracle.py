"""The oracle of the joint search: it sees the answers' loss, and never makes that larger."""

import pytest
import torch
from tiny_llava import random_image

from qvlm_plugin import planning
from qvlm_plugin.calibration import CalibrationSet, Sample
from qvlm_plugin.conversation import Conversation
from qvlm_plugin.linear import QuantLinear
from qvlm_plugin.methods.hidden import block_inputs
from qvlm_plugin.plan_request import check_request


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
    assert oracle.choose(loaded, samples, percentiles) == [first, second]
    assert loss_of(oracle, loaded, samples) == pytest.approx(expected)
