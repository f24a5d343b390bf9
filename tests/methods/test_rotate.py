"""Rotated inputs: exact in full precision, for towers, projectors and decoders of any width, and good for rounding."""

from dataclasses import replace

import pytest
import torch
from family_list import FAMILIES, ORIGINAL
from tiny_llava import logits_of

from qvlm_plugin import planning
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.formats import ActivationFormat, WeightFormat
from qvlm_plugin.models.loading import load
from qvlm_plugin.plan_request import check_request

OPTIONS = {"transform": "rotate", "activations": "token"}


def plan_of(loaded, calibration, scheme="w4a4", **options):
    return planning.obtain_plan(
        loaded,
        check_request("rtn", scheme, {"calibration_batch_size": 5, **OPTIONS, **options}),
        calibration,
        cache=None,
    )


@pytest.mark.parametrize("family", [*ORIGINAL, "llava", "llava-next", "llava-onevision"])
def test_a_rotated_model_that_rounds_nothing_is_the_model(family, tmp_path, calibration):
    """Every site of CLIP, SigLIP and DINOv2 towers, of projectors, and of Llama, Qwen2 and StableLM."""
    loaded = load(str(FAMILIES[family](tmp_path / "model")), dtype="float32")
    inputs, _ = next(calibration.batches(loaded.processor, 5))
    before = logits_of(loaded.model, inputs)
    plan = plan_of(loaded, calibration, "w8a8")
    sites = {module.site for module in plan.modules if module.weight.kind != "none"}
    assert sites and {rotation.site for rotation in plan.rotations} == sites
    modules = [
        one.model_copy(update={"weight": WeightFormat(), "activation": ActivationFormat()}) for one in plan.modules
    ]
    planning.apply(replace(plan, modules=tuple(modules), tensors={}), loaded)
    assert torch.allclose(logits_of(loaded.model, inputs), before, atol=1e-4 * float(before.abs().max()))


def test_a_massive_channel_costs_a_token_little_where_it_is_rotated(tiny_llava, calibration):
    """A decoder whose inputs have one channel a hundred times as large as the others, as real ones do."""
    errors = []
    for transform in ("none", "rotate"):
        loaded = load(str(tiny_llava), dtype="float32")
        with torch.no_grad():
            for layer in loaded.model.model.language_model.layers:
                layer.input_layernorm.weight[3] = 100
                for name in ("q_proj", "k_proj", "v_proj"):
                    getattr(layer.self_attn, name).weight[:, 3] /= 100
        inputs, _ = next(calibration.batches(loaded.processor, 5))
        before = logits_of(loaded.model, inputs)
        planning.apply(
            plan_of(loaded, calibration, "w16a6+vision:w16a16+projector:w16a16", transform=transform), loaded
        )
        errors.append(float((logits_of(loaded.model, inputs) - before).norm() / before.norm()))
    assert errors[1] < 0.6 * errors[0]


def test_only_what_is_quantized_is_rotated(loaded, calibration):
    plan = plan_of(loaded, calibration, "w4a16+vision:w16a16+projector:w16a4", rotation_seed=7)
    parts = {module.site: module.part for module in plan.modules}
    assert {parts[rotation.site] for rotation in plan.rotations} == {"decoder", "projector"}
    assert {rotation.seed for rotation in plan.rotations} == {7}


def test_static_ranges_are_refused_and_the_seed_without_rotation(loaded):
    with pytest.raises(QVLMError, match="use it with activations=token"):
        check_request("qlora", "w4a4", {"transform": "rotate"})
    with pytest.raises(
        QVLMError, match=r"rotation_seed=3 is used with transform=rotate or transform=smooth\+rotate only"
    ):
        check_request("qlora", "w4a4", {"rotation_seed": 3})
