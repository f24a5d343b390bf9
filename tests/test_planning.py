import json
import shutil
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch

from qvlm_plugin import planning
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.methods import qlora
from qvlm_plugin.methods.base import imported
from qvlm_plugin.models.loading import load
from qvlm_plugin.plan import RoundingPlan


@pytest.mark.parametrize(
    "method, scheme, options, message",
    [
        ("gptq", "w4a4", {}, "method='gptq' is not known; allowed are awq, none, qlora, qvlm, qvlm_jacobian, rtn"),
        ("rtn", "w4", {}, "for example w4a4"),
        ("rtn", "w4a4", {"norm": 2}, "unknown argument 'norm'; method=rtn takes these options: weights, group_size"),
        ("none", "w4a4", {"weights": "nf"}, "these options: none"),
        ("qlora", "w4a4", {"norm": -1}, "norm=-1 is not allowed for method=qlora"),
        ("qlora", "w4a4", {"weights": "fp8"}, "weights='fp8' is not allowed"),
    ],
)
def test_bad_requests_are_one_line_and_say_what_is_allowed(method, scheme, options, message):
    with pytest.raises(QVLMError, match=message) as caught:
        planning.check_request(method, scheme, options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", ["rtn", "qlora", "awq", "qvlm"])
def test_fewer_samples_than_a_batch_are_refused_before_work(method, loaded, calibration, monkeypatch):
    monkeypatch.setattr(loaded.model, "forward", lambda *args, **kwargs: pytest.fail("ran the model"))
    request = planning.check_request(method, "w4a4", {"calibration_batch_size": 6})
    message = r"calibration='memory' has 5 samples, .*calibration_batch_size=6; draw at least 6 .* to at most 5"
    with pytest.raises(QVLMError, match=message) as caught:
        planning.obtain_plan(loaded, request, calibration, None)
    assert "\n" not in str(caught.value)
    planning.check_calibration(planning.check_request(method, "w4a4", {"calibration_batch_size": 5}), calibration)
    planning.check_calibration(planning.check_request(method, "w16a16", {}), None)


@pytest.mark.parametrize("method", ["rtn", "qlora", "awq", "qvlm"])
def test_a_model_without_the_blocks_of_its_topology_is_refused_before_work(method, loaded, calibration, monkeypatch):
    monkeypatch.setattr(loaded.model, "forward", lambda *args, **kwargs: pytest.fail("ran the model"))
    monkeypatch.delattr(loaded.model.model.language_model, "layers")
    request = planning.check_request(method, "w4a4", {"calibration_batch_size": 2})
    with pytest.raises(QVLMError, match=r"names 'model\.language_model\.layers', which .* does not have") as caught:
        planning.obtain_plan(loaded, request, calibration, None)
    assert "\n" not in str(caught.value)


def test_the_second_run_loads_what_the_first_searched(loaded, calibration, tmp_path, monkeypatch):
    request = planning.check_request("qlora", "w4a4", {"calibration_batch_size": 2})
    first = planning.obtain_plan(loaded, request, calibration, tmp_path)
    monkeypatch.setattr(qlora, "search_ranges", lambda *args: pytest.fail("searched again"))
    again = planning.obtain_plan(loaded, request, calibration, tmp_path)
    assert again.hash == first.hash and again.search_seconds == first.search_seconds > 0


def test_samples_longer_than_the_context_are_counted(loaded, calibration, capsys):
    request = planning.check_request("rtn", "w8a8", {"calibration_batch_size": 5})
    assert planning.obtain_plan(loaded, request, calibration, None).calibration.over_context == 0
    assert loaded.context == 512 and "context" not in capsys.readouterr().err
    longest = max(calibration.lengths(loaded.processor))
    text = planning.obtain_plan(replace(loaded, context=longest), request, calibration, None)
    assert text.calibration.over_context == 0
    plan = planning.obtain_plan(replace(loaded, context=longest - 1), request, calibration, None)
    over = plan.calibration.over_context
    assert over and plan.facts["calibration"]["over_context"] == over
    assert f"{over} of 5 samples have more tokens than the model's context of {longest - 1}" in capsys.readouterr().err


def test_a_damaged_cache_entry_is_searched_anew(loaded, calibration, tmp_path):
    request = planning.check_request("rtn", "w8a8", {"calibration_batch_size": 5})
    first = planning.obtain_plan(loaded, request, calibration, tmp_path)
    (entry,) = (path for path in tmp_path.iterdir() if path.is_dir())
    (entry / "plan.safetensors").write_bytes(b"rubbish")
    assert planning.obtain_plan(loaded, request, calibration, tmp_path).hash == first.hash
    assert RoundingPlan.load(entry).hash == first.hash


def test_steps_of_a_search_that_was_killed_at_its_end_are_removed(loaded, calibration, tmp_path):
    request = planning.check_request("rtn", "w8a8", {"calibration_batch_size": 5})
    first = planning.obtain_plan(loaded, request, calibration, tmp_path)
    (entry,) = (path for path in tmp_path.iterdir() if path.is_dir())
    steps = tmp_path / f"{entry.name}.steps"
    steps.mkdir()
    (steps / "layers-0-0.safetensors").write_bytes(b"left over")
    assert planning.obtain_plan(loaded, request, calibration, tmp_path).hash == first.hash
    assert not steps.exists() and entry.exists()


def test_the_key_follows_all_that_decides_the_plan(loaded, calibration, monkeypatch):
    def key(method="qlora", scheme="w4a4", samples=calibration, **options):
        return planning.cache_key(loaded, planning.check_request(method, scheme, options), samples)

    fewer = replace(calibration, samples=calibration.samples[1:])
    variants = [key(), key("rtn"), key(scheme="w4a8"), key(norm=1), key(samples=fewer), key(samples=None)]
    assert len(set(variants)) == len(variants) and key() == variants[0]
    with monkeypatch.context() as patch:
        patch.setattr(planning, "sources_digest", lambda package: f"another {package}")
        assert key() != variants[0]
    with monkeypatch.context() as patch:
        patch.setattr(planning, "execution_device", lambda model: torch.device("xpu"))
        assert key() != variants[0]
    monkeypatch.setattr(loaded.model.config, "_attn_implementation", "flash_attention_2")
    assert key() != variants[0]


@pytest.mark.parametrize("changed", ["generation_config.json", "processor_config.json"])
def test_the_key_follows_the_folders_files(tiny_llava, loaded, tmp_path, changed):
    folder = shutil.copytree(tiny_llava, tmp_path / "model")
    settings = json.loads((folder / changed).read_text())
    (folder / changed).write_text(json.dumps(settings | {"repetition_penalty": 1.3}))
    request = planning.check_request("rtn", "w4a4", {})
    keys = [planning.cache_key(one, request, None) for one in (loaded, load(str(folder), dtype="float32"))]
    assert keys[0] != keys[1]


def test_the_key_follows_the_package_of_a_fit_that_is_named(loaded, monkeypatch, tmp_path):
    package = tmp_path / "their_method"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "search.py").write_text("raise AssertionError('imported before it is called')")
    monkeypatch.syspath_prepend(tmp_path)
    fit = imported("their_method.search:fit")
    request = planning.check_request("none", "w4a4", {})
    requests = [replace(request, method=replace(request.method, fit=one)) for one in (fit, partial(fit, "a name"))]
    first = [planning.cache_key(loaded, one, None) for one in requests]
    (package / "search.py").write_text("def fit(*arguments): return arguments")
    for one, key in zip(requests, first, strict=True):
        assert planning.cache_key(loaded, one, None) not in (key, planning.cache_key(loaded, request, None))
    assert [one.method.fit("model")[-1] for one in requests] == ["model", "model"]
    del sys.modules["their_method"], sys.modules["their_method.search"]


@pytest.mark.parametrize("where", ["anywhere", "while training"])
def test_a_search_that_runs_out_of_memory_goes_on_with_smaller_batches(
    where, loaded, calibration, tmp_path, monkeypatch, capsys
):
    options = {"veo_epochs": 1, "min_percentile": 0.99, "min_ratio": 0.8, "max_depth": 1}
    small = planning.check_request("qvlm", "w4a4", options | {"calibration_batch_size": 2})
    expected = planning.obtain_plan(loaded, small, calibration, None)
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    forward = loaded.model.forward

    def short_of_memory(*args, **kwargs):
        if len(kwargs["input_ids"]) > 2 and (where == "anywhere" or torch.is_grad_enabled()):
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB")
        return forward(*args, **kwargs)

    monkeypatch.setattr(loaded.model, "forward", short_of_memory)
    request = planning.check_request("qvlm", "w4a4", options | {"calibration_batch_size": 5})
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
    request = planning.check_request("rtn", "w4a4", {"calibration_batch_size": 4})
    with pytest.raises(QVLMError, match=r"with one sample at a time; search .* --device_map offload: CUDA") as caught:
        planning.obtain_plan(loaded, request, calibration, None)
    assert "\n" not in str(caught.value)
