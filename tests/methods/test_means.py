import pytest
import torch
from methods.test_awq import inputs_of, plan_of, sites_of
from searching import context_of

from qvlm_plugin import planning
from qvlm_plugin.methods.draft import Draft
from qvlm_plugin.methods.means import MASSIVE, observe_means, ordinary
from qvlm_plugin.plan_request import check_request


def test_means_are_those_of_the_inputs(loaded, calibration):
    inputs = inputs_of(loaded, calibration)
    means = observe_means(context_of(loaded, calibration), Draft()).tensors
    assert set(means) == {f"{name}/mean" for name in inputs}
    for name, tokens in inputs.items():
        torch.testing.assert_close(means[f"{name}/mean"], tokens.mean(dim=0), atol=1e-5, rtol=1e-4)


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
