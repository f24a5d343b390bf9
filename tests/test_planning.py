import json
import shutil
import sys
from dataclasses import replace

import pytest
import torch

from qvlm_plugin import planning
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.methods import lp
from qvlm_plugin.methods.base import Step, imported
from qvlm_plugin.models.loading import load
from qvlm_plugin.plan import RoundingPlan


@pytest.mark.parametrize(
    "method, scheme, options, message",
    [
        ("gptq", "w4a4", {}, "method='gptq' is not known; allowed are awq, none, qlora, qvlm, qvlm_jacobian, rtn"),
        ("rtn", "w4", {}, "for example w4a4"),
        ("rtn", "w4a4", {"nrm": 2}, "unknown argument 'nrm'; method=rtn takes these options: weights, group_size"),
        ("rtn", "w4a4", {"norm": 1}, "method=rtn: norm=1.0 is read with observer=lp only"),
        ("qlora", "w4a4", {"alpha_steps": 3}, "alpha_steps=3 is read with transform=awq only"),
        ("rtn", "w4a4", {"importance": "jacobian"}, "observer=lp and activations=channel"),
        ("qvlm_jacobian", "w4a4", {"transform": "smooth"}, "use veo_train=clip"),
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
    monkeypatch.setattr(lp, "search_ranges", lambda *args: pytest.fail("searched again"))
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


def test_the_key_follows_the_package_of_a_step_that_is_named(loaded, monkeypatch, tmp_path):
    package = tmp_path / "their_method"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "search.py").write_text("raise AssertionError('imported before it is called')")
    monkeypatch.syspath_prepend(tmp_path)
    step = Step("theirs", imported("their_method.search:step"), lambda scheme, options: True)
    request = planning.check_request("rtn", "w4a4", {})
    theirs = replace(request, method=replace(request.method, steps=(*request.method.steps, step)))
    first = planning.cache_key(loaded, theirs, None)
    (package / "search.py").write_text("def step(context, draft): return context, draft")
    assert planning.cache_key(loaded, theirs, None) not in (first, planning.cache_key(loaded, request, None))
    assert step.run("model", "draft") == ("model", "draft")
    del sys.modules["their_method"], sys.modules["their_method.search"]


FULL = {"veo_epochs": 1, "veo_train": "clip+norm", "min_percentile": 0.99, "min_ratio": 0.8, "max_depth": 1}
"""Of qvlm with every step but transforms."""


@pytest.mark.parametrize("importance", ["uniform", "jacobian"])
def test_a_search_that_runs_out_of_memory_anywhere_gives_the_plan_of_an_undisturbed_one(
    importance, loaded, calibration, tmp_path, monkeypatch, capsys
):
    options = {**FULL, "importance": importance, "bias_correction": True, "calibration_batch_size": 5}
    request = planning.check_request("qvlm", "w4a4", options)
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
    names = [step.name for step in request.method.chosen(request.scheme, request.options)]
    assert [name for name, _ in ran] == [name for name in names for _ in range(4 if name == "blocks" else 2)]
    assert ran[-1] == ("blocks", "caches on the CPU, 1 samples at a time")
    assert all(tensor.equal(before[name]) for name, tensor in loaded.model.state_dict().items())
    assert "out of memory in step blocks: going on with caches on the CPU, 2 samples" in capsys.readouterr().err
    assert sorted(path.suffix for path in tmp_path.iterdir()) == ["", ".lock"]


def test_a_search_that_lacks_memory_in_the_smallest_footprint_is_an_error(loaded, calibration, monkeypatch):
    def forward(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB")

    monkeypatch.setattr(loaded.model, "forward", forward)
    request = planning.check_request("rtn", "w4a4", {"calibration_batch_size": 4})
    message = r"ran out of memory .*caches on the CPU; .* --device_map offload.*calibration_batch_size: CUDA"
    with pytest.raises(QVLMError, match=message) as caught:
        planning.obtain_plan(loaded, request, calibration, None)
    assert "\n" not in str(caught.value)
