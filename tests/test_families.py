"""Every family with every step of a search: load, search, apply; and then: answer, save, load, export, load.

Each method has options that make its search short: two candidates where it tries many.
"""

import copy
from contextlib import ExitStack
from dataclasses import replace
from functools import cache

import pytest
import torch
from family_list import FAMILIES
from family_work import CONVERSATIONS, answers, check_batches, load_family, quantized
from searching import context_of
from tiny_llava import logits_of

from qvlm_plugin import planning, plugins
from qvlm_plugin.calibration import CalibrationSet, Sample
from qvlm_plugin.conversation import encode
from qvlm_plugin.export import export
from qvlm_plugin.families import MODEL_TYPES
from qvlm_plugin.families.described import DESCRIBED
from qvlm_plugin.methods.footprint import Footprint
from qvlm_plugin.methods.hidden import block_inputs
from qvlm_plugin.methods.scaling import fold_of
from qvlm_plugin.models.loading import load
from qvlm_plugin.plan import RoundingPlan, apply_fold
from qvlm_plugin.plan_request import check_request
from qvlm_plugin.topology import ORDER, chains_of, linear_layers, resolve

RATIOS = {"min_ratio": 0.9, "ratio_step": 0.1}
SCALES = {"alpha_steps": 2, "min_clip": 0.9}
PERCENTILES = {"min_percentile": 0.95, "percentile_step": 0.05}
OPTIONS = {
    "awq": RATIOS | SCALES,
    "mbq": SCALES,
    "qlora": RATIOS,
    "qvlm": RATIOS | PERCENTILES | {"veo": False},
    "qvlm_jacobian": RATIOS | PERCENTILES | {"cdm": True, "veo_epochs": 1},
    "qvlm_rotated": {"min_percentile": 1, "center": True, "bias_correction": True},
    "rtn": {},
    "smoothquant": {},
}
"""Methods that together run every step. A search is a list of steps, so that others repeat what these do."""
PLANS = ("awq", "qlora", "qvlm_rotated")
"""Methods whose plans have every kind of tensor: folds, clips; bounds; codes, rotations, centers, biases."""
SAMPLES = CalibrationSet(tuple(Sample(one, f" answer {index}") for index, one in enumerate(CONVERSATIONS)))


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    return load_family(FAMILIES[request.param], tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="module")
def plan_of(family):
    """Searches the family's plan of a method and a scheme, once."""
    return cache(lambda method, scheme: search(family, method, scheme, **OPTIONS[method]))


@torch.no_grad()
def outputs_of(model, blocks, inputs):
    """What each block writes in one forward pass, by name."""
    seen = {}
    with ExitStack() as stack:
        for name, block in blocks:
            handle = block.register_forward_hook(lambda _, args, output, name=name: seen.update({name: output}))
            stack.callback(handle.remove)
        model(**inputs)
    return seen


def search(family, method, scheme, **options):
    request = check_request(method, scheme, {**options, "calibration_batch_size": 3})
    return planning.obtain_plan(family, request, SAMPLES, None)


def error_of(logits, exact):
    return float((logits - exact).norm() / exact.norm())


def test_every_model_type_has_a_description():
    assert tuple(DESCRIBED) == MODEL_TYPES


def test_the_methods_run_every_step_of_any_method():
    def steps(methods):
        asked = [check_request(method, "w8a8", options) for method, options in methods.items()]
        return {step.name for one in asked for step in one.method.chosen(one.scheme, one.options)}

    assert steps(OPTIONS) == steps({method: {} for method in plugins.methods()})


def test_a_batch_answers_as_each_of_its_conversations_alone(family):
    check_batches(family)


def test_every_linear_that_matters_has_a_site(family):
    topology = plugins.topology(family.model.config)
    sites = resolve(topology, family.model)
    parts = {site.part for site in sites}
    assert parts == ({"vision", "decoder"} if family.model.config.model_type == "gemma3" else set(ORDER))
    named = {name for site in sites for name in site.linears}
    rest = set(linear_layers(family.model)) - named
    unused_blocks = {name for name in rest if ".layers.2." in name and "vision_tower" in name}
    assert all(name.endswith(("lm_head", "router", "linear_2")) for name in rest - unused_blocks)


def test_scales_that_are_folded_change_nothing(family):
    model = copy.deepcopy(family.model)
    sites = [site for site in resolve(plugins.topology(model.config), model) if site.producer]
    assert any(site.part == "decoder" for site in sites)
    torch.manual_seed(0)
    for site in sites:
        producer = model.get_submodule(site.producer)
        scale = torch.rand(len(producer.weight)) + 0.5
        apply_fold(fold_of(site, model), scale, producer, [model.get_submodule(name) for name in site.linears])
    inputs, _ = encode(family.processor, CONVERSATIONS)
    assert torch.allclose(logits_of(model, inputs), logits_of(family.model, inputs), atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("rows", [None, 1])
def test_blocks_one_by_one_equal_the_whole_model(family, rows):
    context = context_of(family, SAMPLES, calibration_batch_size=3)
    context = replace(context, footprint=Footprint(caches_on_cpu=rows is not None, rows=rows))
    inputs, _ = next(SAMPLES.batches(family.processor, 3))
    for part in ORDER:
        for blocks in chains_of(context.topology, family.model, part):
            expected = outputs_of(family.model, blocks, inputs)
            hidden = block_inputs(context, part, blocks)
            for name, block in blocks:
                hidden = hidden.through(name, block)
                kept = hidden.batches[0].attended if part == "decoder" else ...
                assert torch.allclose(hidden.states[0][kept], expected[name][kept], atol=1e-5)


def test_sixteen_bits_change_nothing(family):
    inputs, _ = encode(family.processor, CONVERSATIONS)
    plan = search(family, "rtn", "w16a16")
    assert torch.equal(logits_of(quantized(family, plan).model, inputs), logits_of(family.model, inputs))


# Of four-bit activations a code may lie so near to the middle of two that another order of sums decides.
@pytest.mark.parametrize(("scheme", "bound"), [("w4a16", 1e-3), ("w4a4", 0.02)])
def test_packed_kernels_compute_what_the_reference_does(family, scheme, bound):
    inputs, _ = encode(family.processor, CONVERSATIONS)
    plan = search(family, "rtn", scheme, group_size=32)
    twin = replace(family, model=copy.deepcopy(family.model))
    execution = planning.apply(plan, twin, "packed")
    assert execution.counts["int4"] > 0
    assert error_of(logits_of(twin.model, inputs), logits_of(quantized(family, plan).model, inputs)) < bound


@pytest.fixture(scope="module")
def error_with(family, plan_of):
    """Applies the family's plan of a method and a scheme; returns the relative error of its logits."""
    inputs, _ = encode(family.processor, CONVERSATIONS)
    exact = logits_of(family.model, inputs)

    @cache
    def error(method, scheme):
        plan = plan_of(method, scheme)
        check_bits(plan, int(scheme[1]))
        return error_of(logits_of(quantized(family, plan).model, inputs), exact)

    return error


@pytest.mark.parametrize("method", OPTIONS)
def test_methods_lose_little_at_eight_bits(error_with, method):
    assert 0 < error_with(method, "w8a8") < 0.15


@pytest.mark.parametrize("method", PLANS)
def test_methods_lose_more_at_four_bits(error_with, method):
    assert error_with(method, "w8a8") < error_with(method, "w4a4")


@pytest.mark.parametrize("method", PLANS)
def test_saved_plans_and_exported_folders_compute_the_same(family, plan_of, method, tmp_path):
    inputs, _ = encode(family.processor, CONVERSATIONS)
    plan = plan_of(method, "w4a4")
    twin = quantized(family, plan)
    plan.save(tmp_path / "plan")
    again = quantized(family, RoundingPlan.load(tmp_path / "plan"))
    assert torch.equal(logits_of(again.model, inputs), logits_of(twin.model, inputs))
    assert torch.equal(answers(again), answers(twin))
    export(plan, replace(family, model=copy.deepcopy(family.model)), tmp_path / "packed", backend="packed")
    exported, packed = load(str(tmp_path / "packed"), dtype="float32"), quantized(family, plan, "packed")
    assert torch.equal(logits_of(exported.model, inputs), logits_of(packed.model, inputs))


def check_bits(plan, bits):
    """Each part that has Linears is quantized to so many bits, and what is outside of the parts is not."""
    for part, effective in plan.effective_bits().items():
        if part in ORDER:
            assert effective["activation"] == bits <= effective["weight"] < bits + 2
        else:
            assert effective == {"weight": 16, "activation": 16}
