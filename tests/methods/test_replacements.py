import dataclasses

import pytest
import torch
from searching import context_of
from tiny_llava import logits_of
from torch import nn

from qvlm_plugin import planning
from qvlm_plugin.kernels.reference import REFERENCE
from qvlm_plugin.methods.replacements import Replacements, quantized_modules, replaced
from qvlm_plugin.plan_request import check_request

FOLDING = {"awq": {"alpha_steps": 3}, "rtn": {"transform": "smooth"}}


def plan_of(loaded, calibration, method, **options):
    request = check_request(method, "w4a4", {"calibration_batch_size": 5, **options})
    return planning.obtain_plan(loaded, request, calibration, cache=None)


def test_replacing_ends_with_the_context_even_after_an_error(loaded):
    name, norm = "model.vision_tower.encoder.layers.0.mlp.fc1", "model.vision_tower.encoder.layers.0.layer_norm1.weight"
    module, value = loaded.model.get_submodule(name), loaded.model.get_parameter(norm).clone()
    other = nn.Linear(24, 40)
    with pytest.raises(RuntimeError), replaced(loaded.model, Replacements({name: other}, {norm: value + 1})):
        assert loaded.model.get_submodule(name) is other
        assert torch.equal(loaded.model.get_parameter(norm), value + 1)
        raise RuntimeError
    assert loaded.model.get_submodule(name) is module and torch.equal(loaded.model.get_parameter(norm), value)


@pytest.mark.parametrize("method", FOLDING)
def test_the_whole_of_a_plan_is_the_model_that_applying_it_makes(method, loaded, calibration):
    plan = plan_of(loaded, calibration, method, **FOLDING[method])
    assert plan.folds
    norm = "model.vision_tower.encoder.layers.0.layer_norm1.weight"
    trained = loaded.model.get_parameter(norm).detach() * 1.5
    plan = dataclasses.replace(plan, replaced=(norm,), tensors={**plan.tensors, f"{norm}/value": trained})
    inputs, _ = next(calibration.batches(loaded.processor, 5))
    before = logits_of(loaded.model, inputs)
    with replaced(loaded.model, quantized_modules(plan, loaded.model, REFERENCE)):
        for_a_while = logits_of(loaded.model, inputs)
    assert torch.equal(logits_of(loaded.model, inputs), before)
    planning.apply(plan, loaded)
    assert torch.equal(logits_of(loaded.model, inputs), for_a_while) and not torch.equal(before, for_a_while)


def test_only_what_is_asked_for_is_stood_in_for(loaded, calibration):
    plan, context = plan_of(loaded, calibration, "awq", alpha_steps=2), context_of(loaded)
    name, layer = context.layers[0]
    found = quantized_modules(plan, loaded.model, REFERENCE, (name,))
    assert len(found.linears) == 7 and all(key.startswith(f"{name}.") for key in found.linears)
    assert {key.rpartition(".")[0] for key in found.values} == {
        f"{name}.input_layernorm", f"{name}.post_attention_layernorm"
    }  # fmt: skip
    within = found.within(name)
    assert all(isinstance(layer.get_submodule(key), nn.Linear) for key in within.linears)
