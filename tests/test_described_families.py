"""The families of the Hugging Face layout beside LLaVA's: each from its folder to a quantized checkpoint."""

import copy
from contextlib import ExitStack
from dataclasses import replace
from functools import cache

import pytest
import torch
from family_list import DESCRIBED
from family_work import CONVERSATIONS, answers, check_batches, load_family, quantized
from searching import context_of
from tiny_llava import logits_of

from qvlm_plugin import planning, plugins
from qvlm_plugin.calibration import CalibrationSet, Sample
from qvlm_plugin.conversation import encode
from qvlm_plugin.export import export
from qvlm_plugin.families import MODEL_TYPES
from qvlm_plugin.families.described import DESCRIBED as DESCRIPTIONS
from qvlm_plugin.methods.footprint import Footprint
from qvlm_plugin.methods.hidden import block_inputs
from qvlm_plugin.methods.scaling import fold_of
from qvlm_plugin.models.loading import load
from qvlm_plugin.plan import RoundingPlan, apply_fold
from qvlm_plugin.plan_request import check_request
from qvlm_plugin.topology import ORDER, chains_of, resolve

SMALL = {"min_percentile": 0.95, "percentile_step": 0.05}
OPTIONS = {
    "rtn": {},
    "awq": {"min_ratio": 0.9, "ratio_step": 0.1, "alpha_steps": 3, "min_clip": 0.9},
    "smoothquant": {},
    "gptq": {},
    "qvlm": {"min_ratio": 0.9, "ratio_step": 0.1, "veo_epochs": 1, **SMALL},
    "qvlm_rotated": SMALL,
}


@pytest.fixture(scope="module", params=DESCRIBED)
def family(request, tmp_path_factory):
    return load_family(DESCRIBED[request.param], tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="module")
def samples():
    return CalibrationSet(tuple(Sample(one, f" answer {index}") for index, one in enumerate(CONVERSATIONS)))


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


def test_every_model_type_has_a_description():
    assert tuple(DESCRIPTIONS) == MODEL_TYPES


def test_a_batch_answers_as_each_of_its_conversations_alone(family):
    check_batches(family)


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
def test_blocks_one_by_one_equal_the_whole_model(family, samples, rows):
    context = context_of(family, samples, calibration_batch_size=3)
    context = replace(context, footprint=Footprint(caches_on_cpu=rows is not None, rows=rows))
    inputs, _ = next(samples.batches(family.processor, 3))
    for part in ORDER:
        for blocks in chains_of(context.topology, family.model, part):
            expected = outputs_of(family.model, blocks, inputs)
            hidden = block_inputs(context, part, blocks)
            for name, block in blocks:
                hidden = hidden.through(name, block)
                kept = hidden.batches[0].attended if part == "decoder" else ...
                assert torch.allclose(hidden.states[0][kept], expected[name][kept], atol=1e-5)


@pytest.fixture(scope="module")
def plans(family, samples):
    """Searches plans of the family, each once."""

    @cache
    def search(method, scheme):
        request = check_request(method, scheme, {**OPTIONS[method], "calibration_batch_size": 3})
        return planning.obtain_plan(family, request, samples, None)

    return search


@pytest.mark.parametrize("method", OPTIONS)
def test_presets_quantize_and_a_saved_plan_answers_alike(family, plans, method, tmp_path):
    inputs, _ = encode(family.processor, CONVERSATIONS)
    exact, errors = logits_of(family.model, inputs), {}
    for scheme in ("w8a8", "w4a4"):
        plan = plans(method, scheme)
        twin = quantized(family, plan)
        logits = logits_of(twin.model, inputs)
        errors[scheme] = float((logits - exact).norm() / exact.norm())
        bits = plan.effective_bits()
        assert {"vision", "decoder"} <= bits.keys() <= {*ORDER, "other"}
        for part in bits.keys() & set(ORDER):
            assert bits[part]["activation"] == int(scheme[1]) <= bits[part]["weight"] < int(scheme[1]) + 2
    assert 0 < errors["w8a8"] < 0.15
    assert errors["w8a8"] < errors["w4a4"]
    plan.save(tmp_path / "plan")
    again = quantized(family, RoundingPlan.load(tmp_path / "plan"))
    assert torch.equal(logits_of(again.model, inputs), logits)
    assert torch.equal(answers(again), answers(twin))


def test_an_exported_folder_answers_alike(family, plans, tmp_path):
    plan, exported = plans("qvlm_rotated", "w4a4"), replace(family, model=copy.deepcopy(family.model))
    export(plan, exported, tmp_path / "packed", backend="packed")
    again, twin = load(str(tmp_path / "packed"), dtype="float32"), quantized(family, plan, "packed")
    inputs, _ = encode(again.processor, CONVERSATIONS)
    assert torch.equal(logits_of(again.model, inputs), logits_of(twin.model, inputs))
    assert torch.equal(answers(again), answers(twin))
