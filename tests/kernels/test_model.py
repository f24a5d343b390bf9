"""A whole quantized model on packed kernels."""

import pytest
from kernel_problems import relative
from tiny_llava import logits_of

from qvlm_plugin import planning
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.harness.wrapper import QVLMChat
from qvlm_plugin.models.loading import load
from qvlm_plugin.plan_request import check_request

OPTIONS = {"group_size": 32, "calibration_batch_size": 5}


def run(tiny_llava, calibration, scheme, backend, **options):
    loaded = load(str(tiny_llava), dtype="float32")
    request = check_request("rtn", scheme, OPTIONS | options)
    plan = planning.obtain_plan(loaded, request, calibration, cache=None)
    execution = planning.apply(plan, loaded, backend)
    inputs, _ = next(calibration.batches(loaded.processor, 5))
    return logits_of(loaded.model, inputs), execution


@pytest.mark.parametrize(
    ("scheme", "options", "counts", "bound"),
    [
        ("w4a4", {}, {"int4", "reference"}, 1e-4),
        ("w4a16", {}, {"int4", "reference"}, 1e-4),
        ("w8a8", {}, {"int8"}, 0.05),
        ("w8a8", {"weights": "nf"}, {"int8"}, 0.05),
        ("w4a4+vision:w8a8+projector:w8a8", {}, {"int4", "int8"}, 0.2),
        ("w4a16", {"weights": "nf"}, {"nf4", "reference"}, 1e-3),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "packed"])
def test_logits_are_close_to_the_references(tiny_llava, calibration, scheme, options, counts, bound, backend):
    if options:
        pytest.importorskip("bitsandbytes")
    expected, alone = run(tiny_llava, calibration, scheme, "reference", **options)
    logits, execution = run(tiny_llava, calibration, scheme, backend, **options)
    assert relative(logits, expected) < bound
    assert set(execution.counts) == counts and sum(execution.counts.values()) == len(execution.choices)
    assert alone.counts == {"reference": len(alone.choices)} and not alone.fallbacks


def test_what_fell_back_is_told_in_one_line(tiny_llava, calibration):
    _, execution = run(tiny_llava, calibration, "w4a4", "packed")
    assert all("vision_tower" in name or "projector" in name for name in execution.fallbacks)
    line = str(execution)
    assert f"reference {len(execution.fallbacks)}" in line and "for example model.vision_tower" in line
    assert "24 output features are not a multiple of 16" in line and "\n" not in line


def test_strict_refuses_to_fall_back_and_keeps_the_model(loaded, calibration):
    plan = planning.obtain_plan(loaded, check_request("rtn", "w4a4", OPTIONS), calibration, cache=None)
    before = list(loaded.model.modules())
    with pytest.raises(
        QVLMError, match=r"strict=true: model\.vision_tower.* would fall back to reference \(.*int4: 24 ou"
    ) as caught:
        planning.apply(plan, loaded, "packed", strict=True)
    assert "\n" not in str(caught.value) and list(loaded.model.modules()) == before
    planning.apply(plan, loaded, "reference", strict=True)


def test_the_harness_states_what_computed_a_result(tiny_llava):
    arguments = {"pretrained": str(tiny_llava), "device": "cpu", "dtype": "bfloat16", "method": "rtn", "cache": "none"}
    quantization = {"scheme": "w4a16+vision:w8a16+projector:w8a16", "group_size": 32}
    packed = QVLMChat(**arguments, **quantization, backend="packed", strict=True)
    assert set(packed.record.facts["kernels"]) == {"int4", "int8"} and packed.record.facts["fallbacks"] == 0
    reference = QVLMChat(**arguments, **quantization)
    assert reference.record.facts["backend"] == "reference" and set(reference.record.facts["kernels"]) == {"reference"}
    assert packed.response_identity() != reference.response_identity()
    held = [sum(tensor.nbytes for tensor in model._model.parameters()) for model in (packed, reference)]
    assert held[0] < 0.8 * held[1]
    with pytest.raises(QVLMError, match=r"strict=true: model\.vision_tower"):
        QVLMChat(**arguments, scheme="w4a16", group_size=32, backend="auto", strict=True)
