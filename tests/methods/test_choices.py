"""Choices are independent: any of them may be combined, and what the joint search measured is what applying gives."""

import itertools
from dataclasses import replace

import pytest
import torch
from searching import context_of, inputs_of
from tiny_llava import logits_of

from qvlm_plugin import planning
from qvlm_plugin.methods.hidden import block_inputs
from qvlm_plugin.methods.means import ordinary
from qvlm_plugin.methods.options import MethodOptions
from qvlm_plugin.methods.smooth import smoothing_scale
from qvlm_plugin.methods.steps import STEPS
from qvlm_plugin.plan_request import check_request
from qvlm_plugin.quantizers import fake_quantize
from qvlm_plugin.topology import linear_layers

SMALL = {"calibration_batch_size": 5, "alpha_steps": 3, "min_percentile": 0.8, "percentile_step": 0.1, "veo_epochs": 1}


def plan_of(loaded, calibration, scheme="w4a4", method="rtn", **options):
    request = check_request(method, scheme, {"calibration_batch_size": 5, **options})
    return planning.obtain_plan(loaded, request, calibration, cache=None)


CHOICES = [
    {"transform": transform, "activations": activations, "cdm": True, "veo": veo}
    for (transform, activations), veo in zip(
        itertools.product(("none", "awq", "smooth"), ("channel", "token")),
        itertools.cycle((False, True, True)),
        strict=False,
    )
]
CHOICES += [
    {"transform": "smooth+rotate", "activations": "token", "cdm": True, "veo": True, "rounding": "gptq",
     "center": True, "bias_correction": True, "max_percentile": 1.1, "token_bounds": "normal"},
    {"transform": "none", "activations": "channel", "cdm": True, "veo": False, "zero_on_grid": True},
]  # fmt: skip


@pytest.mark.parametrize("choices", CHOICES, ids=lambda one: "-".join(map(str, one.values())))
def test_the_error_that_was_searched_is_that_of_the_applied_plan(choices, loaded, calibration):
    """With every transform, and with a tower that was trained below."""
    options = {key: value for key, value in SMALL.items() if key != "alpha_steps" or choices["transform"] == "awq"}
    context = context_of(loaded, calibration, calibration_batch_size=5)
    reference = block_inputs(context)
    for named in context.layers:
        reference = reference.through(*named)
    plan = plan_of(loaded, calibration, **options, **choices)
    assert bool(plan.folds) == (choices["transform"] in ("awq", "smooth")) and ("veo" in plan.record) == choices["veo"]
    kinds = {module.activation.kind for module in plan.modules if module.part == "decoder"}
    assert kinds == {"static_channel" if choices["activations"] == "channel" else "dynamic_token"}
    planning.apply(plan, loaded)
    hidden = block_inputs(context)
    for named in context.layers:
        hidden = hidden.through(*named)
    error = hidden.error(reference, context.options)
    assert error == pytest.approx(plan.record["cdm"]["blocks"][-1]["error"], rel=1e-3)


@pytest.mark.parametrize("scheme", ["w4a4", "w16a16+vision:w4a4"])
def test_the_towers_blocks_are_searched_as_the_decoders_are(scheme, loaded, calibration):
    context = context_of(loaded, calibration, calibration_batch_size=5)

    def last_states():
        hidden = block_inputs(context, "vision")
        for named in context.blocks("vision"):
            hidden = hidden.through(*named)
        return hidden

    reference = last_states()
    options = {"cdm": True, "cdm_parts": "vision+decoder", "min_percentile": 0.8, "percentile_step": 0.1}
    plan = plan_of(loaded, calibration, scheme, "qvlm_rotated", **options, beam=0, max_depth=2)
    chosen = plan.record["cdm_vision"]["blocks"]
    assert [layer for block in chosen for layer in block["layers"]] == [*range(len(context.blocks("vision")))]
    assert len(plan.record["cdm_vision"]["dependencies"]) == len(context.blocks("vision")) - 1
    assert ("cdm" in plan.record) == (scheme == "w4a4")
    picked = {site: ratio for block in chosen for layer in block["percentiles"] for site, ratio in layer.items()}
    assert picked and all(float(plan.tensors[f"{site}/clip_ratio"]) == pytest.approx(p) for site, p in picked.items())
    alone = plan_of(loaded, calibration, scheme, "qvlm_rotated", **{**options, "cdm_parts": "decoder"}, beam=0)
    assert "cdm_vision" not in alone.record
    planning.apply(plan, loaded)
    assert last_states().error(reference, MethodOptions(relative_error=True)) == pytest.approx(
        chosen[-1]["error"], rel=1e-3
    )


@pytest.mark.parametrize(
    "options",
    [{"transform": "smooth", "smooth_alpha": 0.7},
     {"transform": "smooth+rotate", "smooth_by": "rms", "activations": "token", "center": True}],
    ids=["smooth", "smooth+rotate"],
)  # fmt: skip
def test_smoothing_leaves_full_precision_outputs_as_they_are_and_moves_magnitude(options, loaded, calibration):
    inputs, _ = next(calibration.batches(loaded.processor, 5))
    before = logits_of(loaded.model, inputs)
    plan = plan_of(loaded, calibration, "w8a8", **options)
    weights = {name: linear.weight.clone() for name, linear in linear_layers(loaded.model).items()}
    identity = replace(
        plan,
        modules=tuple(
            module.model_copy(update={"weight": type(module.weight)(), "activation": type(module.activation)()})
            for module in plan.modules
        ),
        tensors={name: tensor for name, tensor in plan.tensors.items() if name.endswith("/scale")},
    )
    assert bool(plan.folds) == (options["transform"] == "smooth") != bool(plan.rotations)
    assert all(rotation.scaled for rotation in plan.rotations)
    planning.apply(identity, loaded)
    changed = [n for n, old in weights.items() if not torch.equal(loaded.model.get_submodule(n).weight, old)]
    assert len(changed) > 15 and torch.allclose(logits_of(loaded.model, inputs), before, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("center", [False, True])
def test_smoothing_by_root_mean_squares_has_the_least_product_of_norms(center, loaded, calibration):
    """What rotated inputs and weights err by; no other scale of a site has less."""
    options = {"transform": "smooth+rotate", "smooth_by": "rms", "activations": "token", "center": center}
    plan = plan_of(loaded, calibration, **options)
    context = context_of(loaded, calibration)
    sites = list(context.sites)
    seen = {site: ordinary(torch.cat(tokens)) for site, tokens in inputs_of(context, sites).items()}
    assert len(plan.rotations) == len(sites) > 10 and not plan.folds
    for site, tokens in seen.items():
        scale = plan.tensors[f"{site.name}/scale"]
        weight = torch.cat([loaded.model.get_submodule(name).weight.detach() for name in site.linears])
        rest = tokens - tokens.mean(dim=0) if center else tokens

        def product(scale, rest=rest, weight=weight):
            return float((rest / scale).square().sum() * (weight * scale).square().sum())

        least = product(scale)
        assert least <= 1.0001 * product(torch.ones_like(scale))
        for seed in range(3):
            other = scale * (0.1 * torch.randn(scale.shape, generator=torch.Generator().manual_seed(seed))).exp()
            assert least < product(other), site.name


def test_smoothing_is_the_published_formula():
    inputs, weights = torch.tensor([4.0, 1.0, 0.0, 9.0]), torch.tensor([1.0, 4.0, 2.0, 0.0])
    found = smoothing_scale(inputs, weights, 0.5)
    assert torch.allclose(found, torch.tensor([2.0, 0.5, 1.0, 1.0]))  # dead channels stay
    assert torch.allclose(smoothing_scale(inputs, weights, 1.0)[:2], inputs[:2])


def test_with_outliers_smoothed_activations_err_less(loaded, calibration):
    with torch.no_grad():  # norms that make a few channels large, as in trained language models
        for layer in loaded.model.model.language_model.layers:
            layer.input_layernorm.weight[::9] *= 30
            layer.post_attention_layernorm.weight[::7] *= 30
    inputs, _ = next(calibration.batches(loaded.processor, 5))
    before, state = logits_of(loaded.model, inputs), {k: v.clone() for k, v in loaded.model.state_dict().items()}
    errors = {}
    for transform in ("none", "smooth"):
        plan = plan_of(loaded, calibration, "w8a4", transform=transform, activations="token", group_size=-1)
        modules = dict(loaded.model.named_modules())
        planning.apply(plan, loaded)
        errors[transform] = float((logits_of(loaded.model, inputs) - before).norm() / before.norm())
        for name, module in modules.items():
            if name:
                loaded.model.set_submodule(name, module)
        loaded.model.load_state_dict(state)
    assert errors["smooth"] < 0.9 * errors["none"]


def test_two_rows_differ_in_one_choice(loaded, calibration):
    """A preset with the other's choice is the other: rtn with lp ranges and nf weights is qlora."""
    other = plan_of(loaded, calibration, observer="lp", weights="nf")
    assert other.hash == plan_of(loaded, calibration, method="qlora").hash
    awq = plan_of(loaded, calibration, method="qlora", weights="int", transform="awq", alpha_steps=3)
    assert awq.hash == plan_of(loaded, calibration, method="awq", alpha_steps=3).hash


def test_steps_are_wanted_by_scheme_and_options():
    def names(method, scheme, **options):
        request = check_request(method, scheme, options)
        return [step.name for step in request.method.chosen(request.scheme, request.options)]

    assert names("none", "w4a4") == []
    assert names("rtn", "w4a4") == ["minmax"] and names("rtn", "w4a16") == []
    assert (
        names("awq", "w4a4") == ["awq", "lp"] and names("awq", "w4a16") == ["awq"] and names("awq", "w16a4") == ["lp"]
    )
    assert names("rtn", "w4a16", transform="smooth") == [] and names("rtn", "w16a8", transform="smooth") == [
        "smooth",
        "minmax",
    ]
    assert names("qvlm", "w4a4") == ["lp", "dependencies", "vision", "blocks"]
    assert names("qvlm", "w4a4", h0=0.5) == ["lp", "vision", "blocks"]
    assert names("quarot", "w4a4") == ["rotate", "clip", "minmax", "gptq"]
    assert names("quarot", "w4a16") == ["rotate", "clip", "gptq"] and names("gptq", "w16a8") == ["minmax"]
    assert names("qlora", "w8a8", zero_on_grid=True, bias_correction=True) == ["means", "lp", "zero"]
    assert names("qvlm_jacobian", "w4a4") == ["means", "lp", "jacobian", "vision"]
    assert names("qvlm", "w16a16+vision:w4a4") == ["lp", "vision"]
    assert len({step.name for step in STEPS}) == len(STEPS)


@pytest.mark.parametrize(
    "more", [{}, {"cdm": True, "min_percentile": 0.8, "max_percentile": 1.2, "percentile_step": 0.2}], ids=len
)
def test_zero_on_grids_is_exact_where_it_lies_inside(more, loaded, calibration):
    """Also after the joint search, whose percentiles narrow and widen ranges."""
    plan = plan_of(loaded, calibration, zero_on_grid=True, **more)
    sites = [key.removesuffix("/lower") for key in plan.tensors if key.endswith("/lower")]
    assert sites
    for site in sites:
        lower, upper = plan.tensors[f"{site}/lower"], plan.tensors[f"{site}/upper"]
        inside = (lower < 0) & (upper > 0)
        rounded = fake_quantize(torch.zeros_like(lower), lower, upper, 4)
        assert inside.any() and (rounded[inside].abs() < 1e-5 * (upper - lower)[inside]).all()
