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
    with pytest.raises(QVLMError, match="5 samples, less than calibration_batch_size=6"):
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


@pytest.mark.parametrize("where", ["anywhere", "while training"])
def test_a_search_that_runs_out_of_memory_goes_on_with_smaller_batches(
    where, loaded, calibration, tmp_path, monkeypatch, capsys
):
    options = {"veo_epochs": 1, "min_percentile": 0.99, "min_ratio": 0.8, "max_depth": 1}
    small = check_request("qvlm", "w4a4", options | {"calibration_batch_size": 2})
    expected = planning.obtain_plan(loaded, small, calibration, None)
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    forward = loaded.model.forward

    def short_of_memory(*args, **kwargs):
        if len(kwargs["input_ids"]) > 2 and (where == "anywhere" or torch.is_grad_enabled()):
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB")
        return forward(*args, **kwargs)

    monkeypatch.setattr(loaded.model, "forward", short_of_memory)
    request = check_request("qvlm", "w4a4", options | {"calibration_batch_size": 5})
    plan = planning.obtain_plan(loaded, request, calibration, tmp_path)
    assert plan.hash == expected.hash and plan.options["calibration_batch_size"] == 2
    said = "out of memory: searching again with calibration_batch_size=2 in place of 5"
    assert said in capsys.readouterr().err
    monkeypatch.undo()
    assert all(tensor.equal(before[name]) for name, tensor in loaded.model.state_dict().items())
    assert planning.obtain_plan(loaded, small, calibration, tmp_path).search_seconds == plan.search_seconds


def test_a_search_that_lacks_memory_for_one_sample_is_an_error(loaded, calibration, monkeypatch):
    def forward(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB")

    monkeypatch.setattr(loaded.model, "forward", forward)
    request = check_request("rtn", "w4a4", {"calibration_batch_size": 4})
    with pytest.raises(QVLMError, match=r"with one sample at a time; search .* --device_map offload: CUDA") as caught:
        planning.obtain_plan(loaded, request, calibration, None)
    assert "\n" not in str(caught.value)
