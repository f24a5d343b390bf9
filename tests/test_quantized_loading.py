"""Models that are quantized while they are loaded."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
from rotations import by_token, rotated
from stored_codes import with_codes
from tiny_llava import logits_of, write_tiny_llava

from qvlm_plugin import backends, planning
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.models.loading import load
from qvlm_plugin.plan_request import check_request
from qvlm_plugin.quantized_loading import QuantizeOnLoad


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_tiny_llava(tmp_path_factory.mktemp("loading") / "tiny", hidden=64)


@pytest.mark.parametrize("kind", ["plain", "codes", "rotated"])
@pytest.mark.parametrize("method", ["rtn", "awq"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_the_model_that_applying_the_plan_makes(source, calibration, method, dtype, kind):
    loaded = load(str(source), dtype=dtype)
    request = check_request(method, "w4a4+vision:w8a8", {"group_size": 32, "calibration_batch_size": 5})
    plan = planning.obtain_plan(loaded, request, calibration, cache=None)
    name = "model.language_model.norm.weight"
    value = loaded.model.get_parameter(name).detach() * 1.5
    plan = dataclasses.replace(plan, replaced=(name,), tensors={**plan.tensors, f"{name}/value": value})
    assert bool(plan.folds) == (method == "awq")
    if kind == "rotated":
        plan = rotated(by_token(plan))
    if kind == "codes":
        plan, _ = with_codes(plan, load(str(source), dtype=dtype))
    expected = planning.apply(plan, loaded, "auto")
    how = QuantizeOnLoad(plan, backends.kernels("auto"))
    directly = load(str(source), dtype=dtype, quantize=how)
    assert how.execution.counts == expected.counts and directly.fingerprint == loaded.fingerprint
    values = dict(directly.model.named_parameters())
    assert values.keys() == dict(loaded.model.named_parameters()).keys()
    assert all(torch.equal(values[key], tensor) for key, tensor in loaded.model.named_parameters())
    inputs, _ = next(calibration.batches(loaded.processor, 5))
    inputs["pixel_values"] = inputs["pixel_values"].to(loaded.model.dtype)
    assert torch.equal(logits_of(directly.model, inputs), logits_of(loaded.model, inputs))
    assert not hasattr(directly.model.config, "quantization_config") and not directly.model.training


def test_errors_come_before_the_weights(source, calibration):
    loaded = load(str(source), dtype="float32")
    plan = planning.obtain_plan(loaded, check_request("rtn", "w4a16", {"group_size": 32}), None, cache=None)
    other = dataclasses.replace(plan, model="0" * 64)
    for wrong, strict, reason in ((other, False, "made for another model"), (plan, True, "strict=true: model.vision")):
        with pytest.raises(QVLMError, match=reason):
            load(str(source), dtype="float32", quantize=QuantizeOnLoad(wrong, backends.kernels("auto"), strict))


MEASURE = """
import json, sys
from qvlm_plugin import backends
from qvlm_plugin.harness.model_size import memory
from qvlm_plugin.models.loading import load
from qvlm_plugin.plan import RoundingPlan
from qvlm_plugin.quantized_loading import QuantizeOnLoad

def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

for folder in sys.argv[1:]:  # the first brings in what any loading takes
    before = status("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
    plan = RoundingPlan.load(f"{folder}/plan")
    loaded = load(folder, dtype="bfloat16", quantize=QuantizeOnLoad(plan, backends.kernels("auto")))
print(json.dumps([status("VmHWM") - before, status("VmRSS") - before, memory(loaded.model)["weight_bytes"]]))
"""


def test_the_peak_of_loading_is_little_more_than_the_model(tmp_path):
    folders = tmp_path / "small", tmp_path / "large"
    for folder, size in zip(folders, ({"hidden": 64}, {"hidden": 512, "layers": 25}), strict=True):
        write_tiny_llava(folder, **size)
        loaded = load(str(folder), dtype="bfloat16")
        request = check_request("rtn", "w4a16", {"group_size": 128})
        planning.obtain_plan(loaded, request, None, cache=None).save(folder / "plan")
    # The allocator gives every large block back at once: what it would keep depends on how the threads took turns.
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, folders)],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    peak, final, weights = json.loads(done.stdout.splitlines()[-1])
    full = sum(tensor.nbytes for tensor in loaded.model.parameters())
    assert weights < 0.35 * full and final < 1.3 * weights and peak < 1.65 * weights
