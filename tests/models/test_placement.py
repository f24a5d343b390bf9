import weakref

import pytest
import torch
from tiny_llava import logits_of
from torch import nn

from qvlm_plugin.models.loading import load
from qvlm_plugin.models.placement import default_device, execution_device, is_offloaded, materialized, place_like

MIXED = {
    "model.vision_tower": "disk", "model.multi_modal_projector": "cpu", "model.language_model": "disk", "lm_head": "cpu"
}  # fmt: skip


@pytest.fixture(params=["offload", MIXED], ids=["offload", "mixed"])
def offloaded(request, tiny_llava):
    return load(str(tiny_llava), dtype="float32", device_map=request.param)


def weights_of(module):
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def test_a_model_runs_where_its_weights_come_to(loaded, offloaded):
    assert is_offloaded(offloaded.model) and not is_offloaded(loaded.model)
    layer = offloaded.model.model.language_model.layers[0]
    for module in (loaded.model, offloaded.model, layer, layer.mlp.up_proj):
        assert execution_device(module) == torch.device("cpu")
    assert execution_device(nn.Linear(1, 1, device="meta")) == torch.device("meta")


def test_materialized_weights_are_there_before_and_after_the_module_runs(loaded, offloaded):
    name = "model.language_model.layers.1"
    expected, layer = weights_of(loaded.model.get_submodule(name)), offloaded.model.get_submodule(name)
    x = torch.randn(2, 3, 32)
    with materialized(layer):
        for _ in range(2):
            assert all(torch.equal(value, expected[key]) for key, value in weights_of(layer).items())
            assert torch.equal(layer.mlp(x), loaded.model.get_submodule(name).mlp(x))
            with materialized(layer.mlp):  # it is already
                layer.mlp(x)
        assert all(parameter.is_meta for parameter in offloaded.model.model.language_model.layers[0].parameters())
    assert all(parameter.is_meta for parameter in layer.parameters())
    assert torch.equal(layer.mlp(x), loaded.model.get_submodule(name).mlp(x))


def test_weights_go_back_after_an_error_and_the_model_is_as_before(loaded, offloaded, calibration):
    with pytest.raises(RuntimeError), materialized(offloaded.model):
        assert not is_offloaded(offloaded.model)
        raise RuntimeError
    assert is_offloaded(offloaded.model)
    inputs, _ = next(calibration.batches(loaded.processor, 5))
    assert torch.equal(logits_of(offloaded.model, inputs), logits_of(loaded.model, inputs))


def test_a_stand_in_is_offloaded_like_its_original_and_gone_with_its_last_use(loaded, offloaded):
    name = "model.language_model.layers.0.mlp.up_proj"
    for model, is_meta in ((loaded.model, False), (offloaded.model, True)):
        module, x = nn.Linear(32, 64), torch.randn(5, 32)
        expected = module(x)
        place_like(module, model.get_submodule(name))
        for _ in range(2):
            assert module.weight.is_meta == module.bias.is_meta == is_meta
            assert torch.equal(module(x), expected)
        alive = weakref.ref(module)
        del module
        assert alive() is None
    with materialized(offloaded.model.get_submodule(name)):
        place_like(resident := nn.Linear(32, 64), offloaded.model.get_submodule(name))
    assert not resident.weight.is_meta


@pytest.mark.parametrize(
    "accelerator, forbidden, expected",
    [(None, "", "cpu"), ("cuda", "", "cuda"), ("mps", "", "mps"), ("cuda", "1", "cpu")],
)
def test_without_a_name_a_model_runs_on_the_accelerator(monkeypatch, accelerator, forbidden, expected):
    found = accelerator and torch.device(accelerator)
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda check_available: found)
    monkeypatch.setenv("ACCELERATE_USE_CPU", forbidden or "0")
    assert default_device() == torch.device(expected)
