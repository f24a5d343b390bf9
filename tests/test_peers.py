"""The comparison with llm-compressor: what is measured of a quantized decoder."""

import pytest
import torch
from tiny_llava import random_image

from qvlm_plugin import planning
from qvlm_plugin.calibration import CalibrationSet, Sample
from qvlm_plugin.conversation import Conversation
from qvlm_plugin.demo import TASKS
from qvlm_plugin.methods.hidden import predicting
from qvlm_plugin.plan_request import check_request


@pytest.fixture
def peers(benchmark_module):
    return benchmark_module("peers")


@pytest.fixture
def calibration():
    samples = (Sample(Conversation.from_prompt(f"what is {i}?", [random_image(i)]), f"answer {i}") for i in range(4))
    return CalibrationSet(tuple(samples))


@pytest.fixture
def reference(peers, benchmark_module, loaded, calibration):
    question_of = benchmark_module("teacher_forced").question_of
    batches = calibration.batches(loaded.processor, 1)
    samples = [(inputs, predicting(answer)) for inputs, answer in batches]
    questions = [
        question_of(loaded, task, index, Conversation.from_prompt(f"{task} {index}", []), "red")
        for task in TASKS
        for index in range(2)
    ]
    inputs = peers.Inputs(samples, torch.randint(5, 50, (2, 9)), questions)
    return peers.reference_of(loaded.model, inputs)


def test_full_precision_loses_nothing(peers, loaded, reference):
    found = peers.measured(loaded.model, reference)
    assert found["layer_error"] == found["kl"] == found["kl_off_domain"] == 0 and len(found["correct"]) == len(TASKS)


@pytest.mark.parametrize("method", ["rtn", "awq", "quarot"])
def test_more_bits_lose_less_whatever_a_method_folds_or_rotates(method, peers, tiny_llava, reference, calibration):
    from qvlm_plugin.models.loading import load

    rows = []
    for scheme in ("w3a16", "w8a16"):
        own = load(str(tiny_llava), dtype="float32")
        request = check_request(method, f"{scheme}+vision:w16a16+projector:w16a16", {"calibration_batch_size": 4})
        plan = planning.obtain_plan(own, request, calibration, None)
        planning.apply(plan, own)
        rows.append(peers.measured(own.model, reference))
    for key in ("layer_error", "kl", "kl_off_domain"):
        assert 0 < 20 * rows[1][key] < rows[0][key]


def test_eight_bits_for_each_token_are_rounded_to_its_own_steps(peers):
    torch.manual_seed(0)
    x = torch.randn(5, 64) * torch.tensor([0.01, 1, 100, 1, 1])[:, None]
    step = x.abs().amax(dim=-1, keepdim=True) / 127.5
    assert ((peers._symmetric(x) - x).abs() <= 0.51 * step + 1e-9).all()
    assert peers._symmetric(torch.zeros(1, 4)).eq(0).all()


def test_layers_are_measured_on_full_precision_inputs(peers, loaded, reference):
    """A layer that adds nothing loses all it had to add, and those above lose nothing by that."""
    layers = loaded.model.model.language_model.layers
    layers[0].forward = lambda hidden_states, *_, **__: hidden_states
    found = peers.measured(loaded.model, reference)
    assert found["layer_error"] == pytest.approx(1 / len(layers)) and found["kl"] > 0
