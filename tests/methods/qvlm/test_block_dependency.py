"""Dependencies of a decoder's layers: of which codes they are, and which tower they are above."""

import itertools
from statistics import mean

import pytest
import torch
from searching import context_of

from qvlm_plugin import planning
from qvlm_plugin.methods import lp
from qvlm_plugin.methods.draft import Draft, build_plan
from qvlm_plugin.methods.hidden import block_inputs, quantized_inputs
from qvlm_plugin.methods.qvlm.block_dependency import dependencies
from qvlm_plugin.methods.qvlm.dependency import Assignment, Ranged, layer_dependency
from qvlm_plugin.methods.qvlm.partition import partition
from qvlm_plugin.plan_request import check_request
from qvlm_plugin.rotation import factors, rotate


@pytest.mark.parametrize("assignment", ["steps", "literal"])
def test_outputs_are_taken_within_the_extremes_of_channels(deep, calibration, assignment):
    context = context_of(deep, calibration, "w4a3", dependency="output", assignment=assignment)
    hidden = start = block_inputs(context)
    outputs = []
    for named in context.layers:
        hidden = hidden.through(*named)
        outputs.append(Ranged.by_extremes(hidden.tokens()))
    how = Assignment(3, literal=assignment == "literal")
    expected = [layer_dependency(a, b, how) for a, b in itertools.pairwise(outputs)]
    assert dependencies(context, build_plan(context, Draft()), start) == pytest.approx(expected) and len(expected) == 3


@pytest.mark.parametrize("transform, activations", [("none", "channel"), ("rotate", "token"), ("smooth", "channel")])
def test_codes_are_those_of_each_layers_first_site(transform, activations, deep, calibration):
    options = {"transform": transform, "activations": activations, "observer": "lp"}
    request = check_request("rtn", "w4a4", {"calibration_batch_size": 5, **options})
    plan = planning.obtain_plan(deep, request, calibration, cache=None)
    context = context_of(deep, calibration, **options)
    values = dependencies(context, plan, block_inputs(context))
    read, by_site = {}, {fold.site: fold for fold in plan.folds}
    names = [f"{name}.self_attn.q_proj" for name, _ in context.layers]
    handles = [
        deep.model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: read.update({name: args[0]})
        )
        for name in names
    ]
    batches = []
    for inputs, _ in calibration.batches(deep.processor, 2):
        with torch.no_grad():
            deep.model(**inputs)
        batches.append({name: x[inputs["attention_mask"].bool()] for name, x in read.items()})
    [handle.remove() for handle in handles]
    ranged = []
    for name in names:
        x = torch.cat([batch[name] for batch in batches])
        if name in by_site:
            x = x / plan.tensors[f"{name}/scale"]
        if transform == "rotate":
            x = rotate(x, factors(next(one for one in plan.rotations if one.site == name)))
        if activations == "channel":
            ranged.append(Ranged(x, plan.tensors[f"{name}/lower"], plan.tensors[f"{name}/upper"]))
        else:
            center, ratio = x.mean(dim=1, keepdim=True), plan.tensors[f"{name}/clip_ratio"]
            bounds = x.amin(dim=1, keepdim=True), x.amax(dim=1, keepdim=True)
            ranged.append(Ranged(x, *(center + (bound - center) * ratio for bound in bounds)))
    expected = [layer_dependency(a, b, Assignment(4)) for a, b in itertools.pairwise(ranged)]
    assert values == pytest.approx(expected, rel=1e-3)


def test_optimizing_the_tower_moves_dependencies_and_the_threshold_stays(deep, calibration):
    """Eq. 8's purpose: blocks follow from the optimized tower, and from the threshold before it was optimized."""
    options = {"calibration_batch_size": 2, "veo_epochs": 3, "veo_clip_rate": 0.1, "min_percentile": 1.0}
    plan = planning.obtain_plan(deep, check_request("qvlm", "w3a3", options), calibration, cache=None)
    record = plan.record["cdm"]
    before = plan.record["dependencies_before"]
    assert record["h0"] == mean(before) and before != record["dependencies"]
    blocks = [tuple(block["layers"]) for block in record["blocks"]]
    assert blocks == [tuple(block) for block in partition(record["dependencies"], record["h0"], 3)]
    context = context_of(deep, calibration, "w3a3", weights="nf", observer="lp")
    untrained = build_plan(context, lp.search_ranges(context, Draft()))
    assert dependencies(context, untrained, quantized_inputs(context, untrained)) == pytest.approx(before, rel=1e-4)
    assert dependencies(context, plan, quantized_inputs(context, plan)) == pytest.approx(
        record["dependencies"], rel=1e-4
    )


def test_the_threshold_is_the_mean_unless_it_is_given(deep, calibration):
    for options in ({}, {"h0": 0.25}):
        request = check_request("qvlm", "w4a4", {"calibration_batch_size": 2, "veo": False, **options})
        record = planning.obtain_plan(deep, request, calibration, cache=None).record
        assert record["cdm"]["h0"] == options.get("h0", mean(record["cdm"]["dependencies"]))
        assert "dependencies_before" not in record
