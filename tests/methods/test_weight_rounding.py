"""GPTQ over a whole model: each block on what is quantized below it, each Linear on what it reads then."""

from dataclasses import replace

import pytest
import torch
from moe_llava import write_moe_llava
from searching import context_of
from tiny_llava import logits_of

from qvlm_plugin import planning
from qvlm_plugin.kernels.reference import quantized_values, round_activation
from qvlm_plugin.methods import weight_rounding
from qvlm_plugin.methods.draft import Draft
from qvlm_plugin.methods.footprint import Footprint
from qvlm_plugin.methods.hidden import block_inputs
from qvlm_plugin.methods.minmax import observe_extremes
from qvlm_plugin.methods.rotate import rotate_inputs
from qvlm_plugin.models.loading import load
from qvlm_plugin.plan import parameters_of, replace_and_fold, rotated_linear
from qvlm_plugin.plan_request import check_request
from qvlm_plugin.rotation import factors, rotate
from qvlm_plugin.topology import ORDER, blocks_of

CPU = torch.device("cpu")
ROTATED = {"transform": "rotate", "activations": "token"}


def plan_of(loaded, calibration, scheme="w4a4", method="rtn", workspace=None, **options):
    groups = {} if options.get("weights") == "nf" else {"group_size": 16}
    request = check_request(method, scheme, {"calibration_batch_size": 5, **groups, **options})
    return planning.obtain_plan(loaded, request, calibration, cache=workspace)


def logits_error(tiny_llava, calibration, **options):
    loaded = load(str(tiny_llava), dtype="float32")
    inputs, _ = next(calibration.batches(loaded.processor, 5))
    before = logits_of(loaded.model, inputs)
    planning.apply(plan_of(loaded, calibration, **options), loaded)
    return float((logits_of(loaded.model, inputs) - before).norm() / before.norm())


@pytest.mark.parametrize(
    "options",
    [{}, ROTATED, {"transform": "awq", "alpha_steps": 3}, {"transform": "smooth"}, {**ROTATED, "weights": "nf"},
     {**ROTATED, "weight_clip": "mse", "correction": 0.5}],
    ids=lambda options: "-".join(map(str, options.values())) or "none",
)  # fmt: skip
def test_weights_err_less_with_it_whatever_else_is_chosen(options, tiny_llava, calibration):
    options, correction = {"scheme": "w3a16", **options}, options.get("correction", 0)
    options.pop("correction", None)
    errors = [logits_error(tiny_llava, calibration, **options)]
    errors.append(logits_error(tiny_llava, calibration, **options, rounding="gptq", correction=correction))
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("options", [{}, {**ROTATED, "weight_clip": "mse"}, {"transform": "awq", "weights": "nf"}])
def test_every_weight_of_the_scheme_has_codes_and_no_clip(options, loaded, calibration):
    plan = plan_of(loaded, calibration, "w4a4+projector:w16a16", rounding="gptq", **options)
    for module in plan.modules:
        quantized = module.part in ("vision", "decoder")
        assert module.weight.stored == quantized and (f"{module.name}/codes" in plan.tensors) == quantized
        assert f"{module.name}/clip" not in plan.tensors


def test_each_linear_is_fitted_to_what_it_reads_in_the_quantized_model(loaded, calibration, tiny_llava):
    """The Linear that is rounded last in a block errs less than nearest codes on the inputs of the finished model."""
    plan = plan_of(loaded, calibration, **ROTATED, rounding="gptq")
    nearest = plan_of(loaded, calibration, **ROTATED)
    original = load(str(tiny_llava), dtype="float32")
    replace_and_fold(plan, dict(original.model.named_modules()))
    planning.apply(plan, loaded)
    context, by_name = context_of(loaded, calibration), {module.name: module for module in plan.modules}
    for part in ORDER:
        hidden = block_inputs(context, part)
        for name, block in blocks_of(context.topology, loaded.model, part):
            sites = [site for site in context_of(original).sites if site.name.startswith(f"{name}.")]
            seen = list(hidden.inputs(name, block, sites[-1:]))
            for linear in sites[-1].linears:
                module = by_name[linear]
                matrices = factors(plan.rotation_of(module))
                weight = rotated_linear(original.model.get_submodule(linear), matrices).weight
                tokens = rotate(torch.cat([batch[sites[-1]] for batch in seen]), matrices)
                x = round_activation(tokens, module.activation, parameters_of(module, plan.tensors, CPU))
                errors = []
                for one in (plan, nearest):
                    entry = next(other for other in one.modules if other.name == linear)
                    values = quantized_values(weight, entry.weight, parameters_of(entry, one.tensors, CPU))
                    errors.append(float(((values - weight) @ x.T).square().sum()))
                assert errors[0] < 0.9 * errors[1], linear
            hidden = hidden.through(name, block)


def test_rows_of_a_batch_change_nothing(loaded, calibration):
    context = context_of(loaded, calibration, calibration_batch_size=5, rounding="gptq", **ROTATED)
    draft = observe_extremes(context, rotate_inputs(context, Draft()))
    whole = weight_rounding.round_weights(context, draft)
    for rows in (1, 2):
        small = weight_rounding.round_weights(replace(context, footprint=Footprint(True, rows)), draft)
        assert all(torch.equal(whole.tensors[name], small.tensors[name]) for name in whole.tensors)


def test_an_interrupted_search_goes_on_with_the_next_block(loaded, calibration, tmp_path, monkeypatch):
    undisturbed = plan_of(loaded, calibration, **ROTATED, rounding="gptq")
    real, seen = weight_rounding.round_block, []

    def failing(context, plan, block, *rest):
        seen.append(block[0])
        if len(seen) == 4:
            raise KeyboardInterrupt
        return real(context, plan, block, *rest)

    monkeypatch.setattr(weight_rounding, "round_block", failing)
    with pytest.raises(KeyboardInterrupt):
        plan_of(loaded, calibration, **ROTATED, rounding="gptq", workspace=tmp_path)
    plan = plan_of(loaded, calibration, **ROTATED, rounding="gptq", workspace=tmp_path)
    assert plan.hash == undisturbed.hash and len(seen) == len(set(seen)) + 1


@pytest.mark.parametrize("correction", [0, 0.5])
def test_experts_have_codes_of_their_own_tokens(tmp_path, calibration, correction):
    moe = load(str(write_moe_llava(tmp_path / "moe")), dtype="float32")
    layer = moe.model.model.language_model.layers[2]
    with torch.no_grad():  # no token chooses the last expert
        direction = torch.zeros(32)
        direction[0] = 1.0
        layer.post_attention_layernorm.bias.add_(20 * direction)
        layer.mlp.router.weight[:, 0] = 0
        layer.mlp.router.weight[3] = -10 * direction
    plan = plan_of(moe, calibration, **ROTATED, rounding="gptq", correction=correction)
    without = [module.name for module in plan.modules if module.weight.kind == "int" and not module.weight.stored]
    idle = "model.language_model.layers.2.mlp.experts.3"
    assert without == [f"{idle}.{name}" for name in ("gate_proj", "up_proj", "down_proj")]
    planning.apply(plan, moe)
    inputs, _ = next(calibration.batches(moe.processor, 5))
    assert logits_of(moe.model, inputs).isfinite().all()
