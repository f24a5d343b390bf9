"""Every search finds the same plan where the weights are offloaded, and holds one block's weights at a time."""

import gc

import pytest
import torch
from rotations import rotated
from tiny_llava import logits_of, write_tiny_llava

from qvlm_plugin import planning, plugins
from qvlm_plugin.kernels.reference import REFERENCE
from qvlm_plugin.linear import QuantLinear
from qvlm_plugin.methods.qvlm import mining
from qvlm_plugin.methods.replacements import quantized_modules
from qvlm_plugin.models.loading import load
from qvlm_plugin.plan_request import check_request
from qvlm_plugin.topology import blocks_of

MIXED = {
    "model.vision_tower": "disk", "model.multi_modal_projector": "cpu", "model.language_model": "disk", "lm_head": "cpu"
}  # fmt: skip
GRID = {"min_percentile": 0.7, "percentile_step": 0.15}
TRAINED = {"veo_epochs": 2, "veo_train": "clip+norm", "veo_clip_rate": 0.02, "veo_norm_rate": 0.05, **GRID}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_llava(tmp_path_factory.mktemp("deep") / "model", layers=4)


def plan_of(loaded, calibration, method, scheme="w3a3", **options):
    request = check_request(method, scheme, {"calibration_batch_size": 2, **options})
    return planning.obtain_plan(loaded, request, calibration, cache=None)


@pytest.mark.parametrize(
    "method, options, device_map",
    [
        ("rtn", {}, "offload"),
        ("qlora", {}, MIXED),
        ("awq", {}, "offload"),
        ("qvlm", {"veo": False, **GRID}, MIXED),
        ("qvlm", {"veo": False, "unit": "site", "beam": 2, "reading": "quantile", **GRID}, "offload"),
        ("qvlm", {"veo": False, "importance": "jacobian", **GRID}, "offload"),
        ("qvlm", {"veo_decoder": "full", "lambda1": 0.0, **TRAINED}, "offload"),
        ("qvlm", {"veo_decoder": "quantized", **TRAINED}, MIXED),
        (
            "qvlm_rotated",
            {"veo_epochs": 1, "group_size": 8, "correction": 0.1, "importance": "jacobian"},
            "offload",
        ),
    ],
    ids=["rtn", "qlora", "awq", "exact", "beam", "jacobian", "veo-full", "veo-quantized", "rotated"],
)
def test_the_plan_is_the_same_and_the_model_left_as_it_was(folder, calibration, method, options, device_map):
    def state(model):
        modules = [(name, type(module), len(module._forward_pre_hooks)) for name, module in model.named_modules()]
        return modules, [(name, value.is_meta, value.requires_grad) for name, value in model.named_parameters()]

    whole = load(str(folder), dtype="float32")
    inputs, _ = next(calibration.batches(whole.processor, 5))
    logits = logits_of(whole.model, inputs)
    expected = plan_of(whole, calibration, method, **options)
    offloaded = load(str(folder), dtype="float32", device_map=device_map)
    before = state(offloaded.model)
    plan = plan_of(offloaded, calibration, method, **options)
    assert plan.hash == expected.hash
    if "veo_decoder" in options:
        veo = plan.record["veo"]
        assert plan.replaced and veo["after"]["total"] < veo["before"]["total"]
    assert state(offloaded.model) == before
    assert torch.equal(logits_of(offloaded.model, inputs), logits)


def test_a_rotation_is_offloaded_with_the_layer(folder, calibration):
    whole, offloaded = (load(str(folder), dtype="float32", device_map=device_map) for device_map in (None, "offload"))
    plan = rotated(plan_of(whole, calibration, "rtn", "w4a16"))
    module = next(module for module in plan.quantized if module.part == "decoder")
    layers = [
        quantized_modules(plan, loaded.model, REFERENCE, (module.name,)).linears[module.name]
        for loaded in (whole, offloaded)
    ]
    x = torch.randn(3, module.shape[1])
    assert layers[1].rotation_names and all(parameter.is_meta for parameter in layers[1].parameters())
    assert torch.equal(layers[0](x), layers[1](x))


@pytest.mark.parametrize("options", [{"veo": False}, {"veo_epochs": 1}], ids=["cdm", "veo"])
def test_one_block_is_in_memory_at_a_time(folder, calibration, options, monkeypatch):
    loaded = load(str(folder), dtype="float32", device_map="offload")
    layers = [layer for _, layer in blocks_of(plugins.topology(loaded.model.config), loaded.model, "decoder")]
    runs, quantized = [], []
    gc.collect()

    def look(layer, *_):
        runs.append(layer)
        for other in layers:
            assert other is layer or all(parameter.is_meta for parameter in other.parameters())

    def search(members, *arguments):
        linears = [thing for thing in gc.get_objects() if type(thing) is QuantLinear]
        quantized.append(sum(not linear.weight.is_meta for linear in linears) - 7 * len(members))
        return search_block(members, *arguments)

    search_block = mining.search_block
    monkeypatch.setattr(mining, "search_block", search)
    for layer in layers:
        layer.register_forward_hook(look)
    plan_of(loaded, calibration, "qvlm", **GRID, **options)
    assert len(runs) > 100
    assert len(quantized) > 1 and not any(quantized)  # besides the 7 Linears of each of a block's layers
