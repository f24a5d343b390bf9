import pytest
import torch
from methods.test_awq import inputs_of, plan_of, sites_of
from searching import context_of
from tiny_llava import logits_of

from qvlm_plugin import planning
from qvlm_plugin.methods.draft import Draft
from qvlm_plugin.methods.means import MASSIVE, observe_means, ordinary
from qvlm_plugin.models.loading import load
from qvlm_plugin.plan_request import check_request


def test_means_are_those_of_the_inputs(loaded, calibration):
    inputs = inputs_of(loaded, calibration)
    context = context_of(loaded, calibration, bias_correction=True, center=True)
    means = observe_means(context, Draft()).tensors
    dynamic = {f"{site.name}/center" for site in context.sites if site.part != "decoder"}
    assert set(means) == {f"{name}/mean" for name in inputs} | dynamic and len(dynamic) > 5
    for name, tokens in inputs.items():
        for key in {f"{name}/mean", f"{name}/center"} & set(means):
            torch.testing.assert_close(means[key], tokens.mean(dim=0), atol=1e-5, rtol=1e-4)


def test_tokens_of_massive_activations_are_left_out():
    tokens = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    massive = torch.full((1, 4), 2 * MASSIVE * float(tokens.norm(dim=1).max()))
    assert torch.equal(ordinary(torch.cat([massive, tokens])), tokens)
    assert not len(ordinary(tokens[:0]))


@pytest.mark.parametrize("method", ["qlora", "awq"])
def test_rounded_weights_leave_the_mean_outputs_alone(method, loaded, calibration):
    plan = plan_of(loaded, calibration, "w3a16", method, bias_correction=True)
    site = next(site for site in sites_of(loaded) if site.part == "projector" and not site.producer)
    tokens = inputs_of(loaded, calibration)[site.name]
    expected = loaded.model.get_submodule(site.name)(tokens).mean(dim=0)
    planning.apply(plan, loaded)
    layer = loaded.model.get_submodule(site.name)
    torch.testing.assert_close(layer(tokens).mean(dim=0), expected, atol=1e-4, rtol=1e-3)
    uncorrected = layer(tokens).mean(dim=0) - layer.bias
    assert (uncorrected - expected).norm() > 0.01 * expected.norm()


def test_what_is_not_rounded_needs_no_correction_and_no_data(loaded, calibration):
    assert not check_request("qlora", "w16a16", {"bias_correction": True}).needs_calibration
    assert not check_request("qlora", "w4a16", {}).needs_calibration
    assert check_request("qlora", "w4a16", {"bias_correction": True}).needs_calibration
    plan = plan_of(loaded, calibration, "w16a4+vision:w4a4", "qlora", bias_correction=True)
    assert {module.part for module in plan.modules if module.weight.corrected} == {"vision"}


@pytest.mark.parametrize("transform", ["none", "rotate"])
def test_centered_tokens_err_less_where_channels_have_offsets(transform, tiny_llava, calibration):
    """Norms whose biases are ten times what they scale, as a trained tower's are, to a degree."""
    errors = []
    for center in (False, True):
        loaded = load(str(tiny_llava), dtype="float32")
        with torch.no_grad():
            for layer in loaded.model.model.vision_tower.encoder.layers:
                for norm in (layer.layer_norm1, layer.layer_norm2):
                    norm.bias.copy_(10 * torch.randn(len(norm.bias), generator=torch.Generator().manual_seed(1)))
        inputs, _ = next(calibration.batches(loaded.processor, 5))
        before = logits_of(loaded.model, inputs)
        options = {"transform": transform, "activations": "token", "center": center}
        plan = plan_of(loaded, calibration, "w16a16+vision:w16a4", "rtn", **options)
        assert {module.part for module in plan.modules if module.activation.centered} == (
            {"vision"} if center else set()
        )
        planning.apply(plan, loaded)
        errors.append(float((logits_of(loaded.model, inputs) - before).norm()))
    assert errors[1] < 0.5 * errors[0]


def test_a_centered_token_is_rounded_within_what_is_left_of_it(loaded, calibration):
    plan = plan_of(loaded, calibration, "w16a3", "rtn", center=True, activations="token")
    planning.apply(plan, loaded)
    name = next(module.site for module in plan.modules if module.activation.centered)
    layer, center = loaded.model.get_submodule(name), plan.tensors[f"{name}/center"]
    x = torch.randn(7, len(center)) + center
    rest = x - center
    step = (rest.amax(dim=1, keepdim=True) - rest.amin(dim=1, keepdim=True)) / 7
    codes = ((rest - rest.amin(dim=1, keepdim=True)) / step).round()
    expected = torch.nn.functional.linear(
        rest.amin(dim=1, keepdim=True) + codes * step + center, layer.weight, layer.bias
    )
    torch.testing.assert_close(layer(x), expected, atol=1e-4, rtol=1e-4)
