from dataclasses import replace

import pytest
import torch

from qvlm_plugin import calibration as calibration_module
from qvlm_plugin import planning
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.plan_request import check_request


def test_calibration_data_are_checked_before_work(loaded, calibration, monkeypatch):
    monkeypatch.setattr(loaded.model, "forward", lambda *args, **kwargs: pytest.fail("ran the model"))
    request = check_request("qvlm", "w4a4", {"calibration_batch_size": 6})
    with pytest.raises(QVLMError, match="5 samples, fewer than calibration_batch_size=6"):
        planning.obtain_plan(loaded, request, calibration, None)


@pytest.mark.parametrize("method", ["rtn", "qlora", "awq", "qvlm"])
def test_a_model_without_the_blocks_of_its_topology_is_refused_before_work(method, loaded, calibration, monkeypatch):
    monkeypatch.setattr(loaded.model, "forward", lambda *args, **kwargs: pytest.fail("ran the model"))
    monkeypatch.delattr(loaded.model.model.language_model, "layers")
    request = check_request(method, "w4a4", {"calibration_batch_size": 2})
    with pytest.raises(QVLMError, match=r"names 'model\.language_model\.layers', which .* does not have") as caught:
        planning.obtain_plan(loaded, request, calibration, None)
    assert "\n" not in str(caught.value)


def test_samples_longer_than_the_context_are_counted(loaded, calibration, capsys):
    request = check_request("rtn", "w8a8", {"calibration_batch_size": 5})
    assert planning.obtain_plan(loaded, request, calibration, None).calibration.over_context == 0
    assert loaded.context == 512 and "context" not in capsys.readouterr().err
    longest = max(calibration.encoded(loaded.processor, 1).lengths)
    text = planning.obtain_plan(replace(loaded, context=longest), request, calibration, None)
    assert text.calibration.over_context == 0
    plan = planning.obtain_plan(replace(loaded, context=longest - 1), request, calibration, None)
    over = plan.calibration.over_context
    assert over and plan.facts["calibration"]["over_context"] == over
    assert f"{over} of 5 samples have more tokens than the model's context of {longest - 1}" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["rtn", "qlora", "awq"])
def test_a_search_encodes_each_sample_once(method, loaded, calibration, monkeypatch):
    def counted(processor, conversations, answers):
        count.append(len(conversations))
        return encode(processor, conversations, answers)

    count, encode = [], calibration_module.encode
    monkeypatch.setattr(calibration_module, "encode", counted)
    request = check_request(method, "w4a4", {"calibration_batch_size": 2})
    plan = planning.obtain_plan(loaded, request, calibration, None)
    assert count == [2, 2, 1]
    monkeypatch.setattr(calibration_module, "KEPT_BYTES", 0)
    assert planning.obtain_plan(loaded, request, calibration, None).hash == plan.hash
    assert len(count) > 6 and sum(count) % 5 == 0


FULL = {"veo_epochs": 1, "veo_train": "clip+norm", "min_percentile": 0.99, "min_ratio": 0.8, "max_depth": 1}
"""Of qvlm with every step but transforms."""


@pytest.mark.parametrize(
    "more",
    [{}, {"importance": "jacobian"},
     {"transform": "rotate", "activations": "token", "veo_train": "clip", "rounding": "gptq", "correction": 0.1,
      "bias_correction": False, "weight_clip": "mse"}],
    ids=["uniform", "jacobian", "gptq"],
)  # fmt: skip
def test_a_search_that_runs_out_of_memory_anywhere_gives_the_plan_of_an_undisturbed_one(
    more, loaded, calibration, tmp_path, monkeypatch, capsys
):
    options = {**FULL, "bias_correction": True, "calibration_batch_size": 5, **more}
    request = check_request("qvlm", "w4a4", options)
    expected = planning.obtain_plan(loaded, request, calibration, None)
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    ran = []

    def short_of_memory(step):
        """Fails in the middle of its work as often as less memory can be taken."""
        layer, failures = loaded.model.model.language_model.layers[1], []

        def fail(module, args):
            if len(failures) < (3 if step.splits else 1):  # caches on the CPU, two samples at a time, one
                failures.append(1)
                raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB")

        def run(context, draft):
            ran.append((step.name, str(context.footprint)))
            handle = layer.register_forward_pre_hook(fail)
            try:
                return step.run(context, draft)
            finally:
                handle.remove()

        return replace(step, run=run)

    steps = tuple(short_of_memory(step) for step in request.method.steps)
    short = replace(request, method=replace(request.method, steps=steps))
    plan = planning.obtain_plan(loaded, short, calibration, tmp_path)
    assert plan.hash == expected.hash and plan.record == expected.record and plan.options == expected.options
    chosen = request.method.chosen(request.scheme, request.options)
    times = {step.name: 1 + (3 if step.splits else 1) * step.reads_calibration(request.scheme, request.options)
             for step in chosen}  # fmt: skip
    assert [name for name, _ in ran] == [name for name in times for _ in range(times[name])]
    assert ran[-1] == ("blocks", "caches on the CPU, 1 samples at a time")
    assert all(tensor.equal(before[name]) for name, tensor in loaded.model.state_dict().items())
    assert "out of memory in step blocks: trying again with caches on the CPU, 2 samples" in capsys.readouterr().err
    assert sorted(path.suffix for path in tmp_path.iterdir()) == ["", ".lock"]


def test_a_search_that_lacks_memory_in_the_smallest_footprint_is_an_error(loaded, calibration, monkeypatch):
    def forward(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB")

    monkeypatch.setattr(loaded.model, "forward", forward)
    request = check_request("rtn", "w4a4", {"calibration_batch_size": 4})
    message = r"ran out of memory .*caches on the CPU; .* --device_map offload.*which finds another plan: CUDA"
    with pytest.raises(QVLMError, match=message) as caught:
        planning.obtain_plan(loaded, request, calibration, None)
    assert "\n" not in str(caught.value)
