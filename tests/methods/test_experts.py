"""Sparse experts: each is calibrated on the tokens that it serves, and one that serves none needs no data."""

import pytest
import searching
import torch
from moe_llava import write_moe_llava
from searching import context_of
from tiny_llava import logits_of
from typer.testing import CliRunner

from qvlm_plugin import planning
from qvlm_plugin.cli import app
from qvlm_plugin.models.loading import load
from qvlm_plugin.plan_request import check_request

IDLE = "model.language_model.layers.2.mlp.experts.3"
METHODS = {
    "rtn": {},
    "qlora": {},
    "awq": {"alpha_steps": 3},
    "qvlm": {"min_percentile": 0.99, "percentile_step": 0.01, "veo_epochs": 1},
    "qvlm_jacobian": {"min_percentile": 0.99, "percentile_step": 0.01, "veo_epochs": 1},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_moe_llava(tmp_path_factory.mktemp("experts") / "moe")


@pytest.fixture
def moe(folder):
    return load(str(folder), dtype="float32")


@pytest.fixture
def idle(moe):
    """The same with an expert that no token chooses."""
    layer = moe.model.model.language_model.layers[2]
    direction = torch.zeros(32)
    direction[0] = 1.0
    with torch.no_grad():  # all tokens lie far along one direction, which repels the expert and leaves the others alone
        layer.post_attention_layernorm.bias.add_(20 * direction)
        layer.mlp.router.weight[:, 0] = 0
        layer.mlp.router.weight[3] = -10 * direction
    return moe


def plan_of(loaded, calibration, method, scheme="w4a4", **options):
    options = {"calibration_batch_size": 2, **options}
    return planning.obtain_plan(loaded, check_request(method, scheme, options), calibration, cache=None)


def inputs_of(loaded, calibration, batch_size):
    context = context_of(loaded, calibration, calibration_batch_size=batch_size)
    seen = searching.inputs_of(context, list(context.activation_sites))
    return {site: torch.cat(tokens) for site, tokens in seen.items()}


def test_experts_see_the_tokens_routed_to_them_and_no_padding(moe, calibration):
    batched, single = inputs_of(moe, calibration, 5), inputs_of(moe, calibration, 1)
    assert batched.keys() == single.keys()
    for site, tokens in batched.items():
        assert len(tokens) == len(single[site])
        assert torch.allclose(tokens.sum(dim=0), single[site].sum(dim=0), atol=1e-2), site.name
    attention = next(len(tokens) for site, tokens in batched.items() if site.part == "decoder")
    served = [len(tokens) for site, tokens in batched.items() if site.block == 0 and site.name.endswith("down_proj")]
    assert len(served) == 4 and sum(served) == 2 * attention  # two experts for each token


@pytest.mark.parametrize("method", METHODS)
def test_an_idle_expert_gets_ranges_without_data_and_is_reported(idle, folder, calibration, method, tmp_path):
    plan = plan_of(idle, calibration, method, **METHODS[method])
    assert plan.record["uncalibrated"] == [f"{IDLE}.gate_proj", f"{IDLE}.down_proj"]
    kinds = {module.name: (module.activation.kind, module.activation.bits) for module in plan.modules}
    for name in ("gate_proj", "up_proj", "down_proj"):
        assert kinds[f"{IDLE}.{name}"] == ("dynamic_token", 4)
        assert kinds[f"{IDLE.removesuffix('3')}2.{name}"] == ("static_channel", 4)
    inputs, _ = next(calibration.batches(idle.processor, 5))
    before = logits_of(idle.model, inputs)
    planning.apply(plan, idle)
    assert not torch.equal(logits_of(idle.model, inputs), before)
    with torch.no_grad():  # now it is the first choice of every token
        idle.model.get_submodule(IDLE.rpartition(".experts")[0]).router.weight[3] *= -1
    assert logits_of(idle.model, inputs).isfinite().all()
    printed = CliRunner().invoke(app, ["inspect", str(plan.save(tmp_path / "plan"))]).output
    assert "uncalibrated" in printed


def test_weights_alone_need_no_calibrated_experts(idle, calibration):
    plan = plan_of(idle, calibration, "awq", "w4a16", alpha_steps=3)
    assert "uncalibrated" not in plan.record
    assert not any(name.startswith(IDLE) for name in plan.tensors)
    planning.apply(plan, idle)


def test_experts_are_quantized_one_by_one_and_the_router_is_not(moe, calibration):
    plan = plan_of(moe, calibration, "rtn")
    router = [module for module in plan.modules if module.name.endswith("router")]
    assert len(router) == 2 and all(module.is_identity and module.part == "other" for module in router)
    sites = {module.site for module in plan.modules if ".experts." in module.name}
    assert len(sites) == 2 * 4 * 2  # layers, experts, inputs
    lower = [plan.tensors[f"{IDLE.removesuffix('3')}{index}.gate_proj/lower"] for index in range(4)]
    assert not any(torch.equal(lower[0], other) for other in lower[1:])
