import copy
import dataclasses

import pytest
import searching
import torch
from searching import context_of
from tiny_families import write_tiny_qwen2_vl
from tiny_llava import logits_of

from qvlm_plugin import planning, plugins
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.formats import WeightFormat
from qvlm_plugin.methods.clipping import search_clip
from qvlm_plugin.methods.draft import Draft
from qvlm_plugin.methods.lp import search_ranges
from qvlm_plugin.methods.options import MethodOptions
from qvlm_plugin.models.loading import load
from qvlm_plugin.plan import RoundingPlan, apply_fold
from qvlm_plugin.plan_request import check_request
from qvlm_plugin.quantizers import quantize_int
from qvlm_plugin.topology import linear_layers, resolve


def plan_of(loaded, calibration, scheme="w4a4", method="awq", **options):
    options = options if method == "none" else {"calibration_batch_size": 2, **options}
    return planning.obtain_plan(loaded, check_request(method, scheme, options), calibration, cache=None)


def sites_of(loaded):
    return resolve(plugins.topology(loaded.model.config), loaded.model)


def inputs_of(loaded, calibration):
    seen = searching.inputs_of(context_of(loaded, calibration), sites_of(loaded))
    return {site.name: torch.cat(tokens) for site, tokens in seen.items()}


def apply_folds(plan, model):
    for fold in plan.folds:
        readers = [model.get_submodule(name) for name in plan.readers(fold.site)]
        apply_fold(fold, plan.tensors[f"{fold.site}/scale"], model.get_submodule(fold.producer), readers)


def relative_error(loaded, plan, inputs):
    reference = logits_of(loaded.model, inputs)
    planning.apply(plan, loaded)
    return float((logits_of(loaded.model, inputs) - reference).norm() / reference.norm())


def test_every_quantized_linear_is_clipped_and_every_foldable_site_scaled(loaded, calibration):
    plan = plan_of(loaded, calibration)
    sites = sites_of(loaded)
    assert [fold.site for fold in plan.folds] == [site.name for site in sites if site.producer]
    assert {fold.head_dim for fold in plan.folds if "o_proj" in fold.site} == {8}  # grouped queries
    assert all(fold.head_dim is None for fold in plan.folds if "o_proj" not in fold.site)
    for module in plan.modules:
        clipped = module.weight.kind != "none" and not module.name.endswith(("q_proj", "k_proj"))
        assert module.weight.clipped == clipped == (f"{module.name}/clip" in plan.tensors)
    for name, tensor in plan.tensors.items():
        if name.endswith("/clip"):
            assert ((tensor >= 0.5) & (tensor <= 1)).all()
    assert any((plan.tensors[f"{fold.site}/scale"] != 1).any() for fold in plan.folds)


def test_scales_alone_leave_full_precision_outputs_as_they_are(loaded, calibration):
    inputs, _ = next(calibration.batches(loaded.processor, 5))
    before = logits_of(loaded.model, inputs)
    plan = plan_of(loaded, calibration, "w3a16")
    unquantized = plan_of(loaded, None, method="none")
    scales = {f"{fold.site}/scale": plan.tensors[f"{fold.site}/scale"] for fold in plan.folds}
    weights = {name: linear.weight.clone() for name, linear in linear_layers(loaded.model).items()}
    planning.apply(dataclasses.replace(unquantized, folds=plan.folds, tensors=scales), loaded)
    changed = [n for n, linear in linear_layers(loaded.model).items() if not torch.equal(linear.weight, weights[n])]
    assert len(changed) > 15
    assert torch.allclose(logits_of(loaded.model, inputs), before, rtol=1e-3, atol=1e-4)


def paper_scales(magnitude, shares):
    return [magnitude.clamp_min(1e-4 * magnitude.max()) ** (step / 20) for step in range(20)]


def duo_scales(magnitude, shares):
    return [torch.ones_like(magnitude)] + [magnitude ** (k / 18) / shares ** (1 - k / 18) for k in range(19)]


def over_shared_heads(values):
    """4 heads of 8 read 2 heads."""
    return torch.cat([values[:16].view(2, 8).mean(0), values[16:].view(2, 8).mean(0)])


@pytest.mark.parametrize("duo_scaling, scales", [(False, paper_scales), (True, duo_scales)])
def test_the_scale_of_every_site_errs_least_of_all_alphas(duo_scaling, scales, loaded, calibration):
    plan = plan_of(loaded, calibration, "w3a16", group_size=16, search_tokens=10**6, duo_scaling=duo_scaling)
    model, inputs = loaded.model, inputs_of(loaded, calibration)
    gains = []
    for site in (site for site in sites_of(loaded) if site.producer):
        x, weights = inputs[site.name], [model.get_submodule(name).weight.detach() for name in site.linears]
        groups = torch.cat(weights).abs().split(16, dim=1)
        both = x.abs().mean(dim=0), torch.cat([g / g.amax(dim=1, keepdim=True) for g in groups], dim=1).mean(dim=0)
        if "o_proj" in site.name:
            both = map(over_shared_heads, both)

        def error(scale, x=x, site=site, weights=weights):
            if "o_proj" in site.name:
                scale = torch.cat([scale[:8], scale[:8], scale[8:], scale[8:]])
            total = 0.0
            for weight in weights:
                rounded = quantize_int(weight * scale, WeightFormat(kind="int", bits=3, group_size=16)).dequantize()
                total += float(((x / scale) @ rounded.T - x @ weight.T).square().sum())
            return total

        grid = [error(power / (power.max() * power.min()).sqrt()) for power in scales(*both)]
        scale = plan.tensors[f"{site.name}/scale"]
        found, without = error(scale), error(torch.ones_like(scale))
        assert grid[0] == pytest.approx(without)
        assert found == pytest.approx(min(grid), rel=1e-3) and found <= without, site.name
        gains.append(found / without)
    assert min(gains) < 0.9


@pytest.mark.parametrize(
    "fmt, options",
    [
        (WeightFormat(kind="int", bits=3, group_size=16), {"group_size": 16}),
        (WeightFormat(kind="nf", bits=3), {"weights": "nf", "double_quantization": False}),
    ],
    ids=str,
)
def test_clips_are_searched_on_the_folded_weights_and_their_inputs(loaded, calibration, fmt, options):
    plan = plan_of(loaded, calibration, "w3a16", search_tokens=10**6, **options)
    folded = dataclasses.replace(loaded, model=copy.deepcopy(loaded.model))
    apply_folds(plan, folded.model)
    inputs = inputs_of(folded, calibration)
    for site in sites_of(loaded):
        for name in site.linears:
            if f"{name}/clip" in plan.tensors:
                weight = folded.model.get_submodule(name).weight.detach()
                expected = search_clip(weight, fmt, inputs[site.name], MethodOptions().clips)
                same = plan.tensors[f"{name}/clip"] == expected
                assert same.float().mean() > 0.97, name  # but for near ties


def test_ranges_are_those_of_the_folded_model(loaded, calibration):
    plan = plan_of(loaded, calibration, "w3a3")
    apply_folds(plan, loaded.model)
    context = context_of(loaded, calibration, "w3a3", observer="lp", calibration_batch_size=8)
    expected = search_ranges(context, Draft()).tensors
    assert len(expected) == 2 * 8 + 10
    for name, tensor in expected.items():
        assert torch.allclose(plan.tensors[name], tensor, rtol=1e-3, atol=1e-4), name


def test_linears_that_compute_queries_or_keys_are_not_clipped(tmp_path, calibration):
    loaded = load(str(write_tiny_qwen2_vl(tmp_path / "model")), dtype="float32")
    plan = plan_of(loaded, calibration, "w4a16", alpha_steps=1, calibration_batch_size=1)
    clipped = {module.name.rpartition(".")[2] for module in plan.quantized if module.weight.clipped}
    assert {"v_proj", "down_proj", "proj"} <= clipped and not clipped & {"q_proj", "k_proj", "qkv"}


@pytest.mark.parametrize("options", [{}, {"weights": "nf"}, {"symmetric": True, "group_size": -1}], ids=str)
def test_fitting_leaves_the_model_as_it_was(loaded, calibration, options):
    before = copy.deepcopy(loaded.model.state_dict())
    plan_of(loaded, calibration, **options)
    after = loaded.model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert not any(module._forward_pre_hooks for module in loaded.model.modules())


def test_16_bits_are_the_identity(loaded, calibration):
    inputs, _ = next(calibration.batches(loaded.processor, 5))
    plan = plan_of(loaded, None, "w16a16")
    assert not plan.tensors and not plan.folds
    assert relative_error(loaded, plan, inputs) == 0


def test_parts_with_16_bit_weights_get_neither_scales_nor_clips(loaded, calibration):
    plan = plan_of(loaded, calibration, "w4a4+vision:w16a8+projector:w16a16")
    touched = {name for name in plan.tensors if name.endswith(("/scale", "/clip"))}
    assert touched and all(".language_model." in name for name in touched)
    assert sum(name.endswith("/clip_ratio") for name in plan.tensors) == 2 * 4  # vision ranges are still searched
    ranges_only = plan_of(loaded, calibration, "w16a4")
    assert not ranges_only.folds and len(ranges_only.tensors) == 2 * 8 + 10


@pytest.mark.parametrize("weights", ["int", "nf"])
def test_a_plan_from_disk_does_the_same(tiny_llava, calibration, tmp_path, weights):
    outputs = []
    for source in ("memory", "disk"):
        loaded = load(str(tiny_llava), dtype="float32")
        inputs, _ = next(calibration.batches(loaded.processor, 5))
        if source == "memory":
            plan = plan_of(loaded, calibration, weights=weights)
            plan.save(tmp_path / "plan")
        else:
            plan = RoundingPlan.load(tmp_path / "plan")
        planning.apply(plan, loaded)
        outputs.append(logits_of(loaded.model, inputs))
    assert torch.equal(*outputs) and outputs[0].isfinite().all()


def test_fitting_twice_gives_the_same_plan(loaded, calibration):
    assert plan_of(loaded, calibration).hash == plan_of(loaded, calibration).hash


def test_weight_only_schemes_need_calibration_too(loaded):
    assert check_request("awq", "w4a16", {}).needs_calibration
    assert check_request("awq", "w16a16+vision:w8a16", {}).needs_calibration
    assert not check_request("awq", "w16a16", {}).needs_calibration
    with pytest.raises(QVLMError, match="method=awq with scheme=w4a16 needs calibration data"):
        plan_of(loaded, None, "w4a16")


@pytest.mark.parametrize(
    "option, message",
    [
        ({"alpha_steps": 0}, "alpha_steps=0 is not allowed for method=awq"),
        ({"min_clip": 1.5}, "min_clip=1.5 is not allowed"),
        ({"search_tokens": 0}, "search_tokens=0 is not allowed"),
        ({"alpha": 0.5}, "unknown argument 'alpha'; method=awq takes these options: .*alpha_steps, min_clip"),
    ],
)
def test_bad_options_are_one_line(option, message):
    with pytest.raises(QVLMError, match=message) as caught:
        check_request("awq", "w4a16", option)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("weights", ["int", "nf"])
def test_with_activation_outliers_awq_errs_less_than_round_to_nearest(tiny_llava, calibration, weights):
    errors = {}
    for method in ("rtn", "awq"):
        loaded = load(str(tiny_llava), dtype="float32")
        with torch.no_grad():  # norms that make a few channels large, as in trained language models
            for layer in loaded.model.model.language_model.layers:
                layer.input_layernorm.weight[::9] *= 12
                layer.post_attention_layernorm.weight[::7] *= 12
        inputs, _ = next(calibration.batches(loaded.processor, 5))
        groups = {"group_size": 32} if weights == "int" else {}
        plan = plan_of(loaded, calibration, "w3a16", method, weights=weights, **groups)
        errors[method] = relative_error(loaded, plan, inputs)
    assert errors["awq"] < 0.85 * errors["rtn"]
