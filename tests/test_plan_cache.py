import json
import shutil
import sys
from dataclasses import replace

import pytest
import torch

from qvlm_plugin import plan_cache
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.methods import lp
from qvlm_plugin.methods.base import Step, imported
from qvlm_plugin.models.loading import load
from qvlm_plugin.plan import RoundingPlan
from qvlm_plugin.plan_cache import cache_key, cached_plan
from qvlm_plugin.plan_request import check_request
from qvlm_plugin.planning import obtain_plan


def test_the_second_run_loads_what_the_first_searched(loaded, calibration, tmp_path, monkeypatch):
    request = check_request("qlora", "w4a4", {"calibration_batch_size": 2})
    first = obtain_plan(loaded, request, calibration, tmp_path)
    monkeypatch.setattr(lp, "search_ranges", lambda *args: pytest.fail("searched again"))
    again = obtain_plan(loaded, request, calibration, tmp_path)
    assert again.hash == first.hash and again.search_seconds == first.search_seconds > 0


def test_a_damaged_cache_entry_is_searched_anew(loaded, calibration, tmp_path):
    request = check_request("rtn", "w8a8", {"calibration_batch_size": 5})
    first = obtain_plan(loaded, request, calibration, tmp_path)
    (entry,) = (path for path in tmp_path.iterdir() if path.is_dir())
    (entry / "plan.safetensors").write_bytes(b"rubbish")
    assert obtain_plan(loaded, request, calibration, tmp_path).hash == first.hash
    assert RoundingPlan.load(entry).hash == first.hash


def test_steps_of_a_search_that_was_killed_at_its_end_are_removed(loaded, calibration, tmp_path):
    request = check_request("rtn", "w8a8", {"calibration_batch_size": 5})
    first = obtain_plan(loaded, request, calibration, tmp_path)
    (entry,) = (path for path in tmp_path.iterdir() if path.is_dir())
    steps = tmp_path / f"{entry.name}.steps"
    steps.mkdir()
    (steps / "layers-0-0.safetensors").write_bytes(b"left over")
    assert obtain_plan(loaded, request, calibration, tmp_path).hash == first.hash
    assert not steps.exists() and entry.exists()


def test_the_key_follows_all_that_decides_the_plan(loaded, calibration, monkeypatch):
    def key(method="qlora", scheme="w4a4", samples=calibration, **options):
        return cache_key(loaded, check_request(method, scheme, options), samples)

    fewer = replace(calibration, samples=calibration.samples[1:])
    variants = [key(), key("rtn"), key(scheme="w4a8"), key(norm=1), key(samples=fewer), key(samples=None)]
    assert len(set(variants)) == len(variants) and key() == variants[0]
    with monkeypatch.context() as patch:
        patch.setattr(plan_cache, "sources_digest", lambda package: f"another {package}")
        assert key() != variants[0]
    with monkeypatch.context() as patch:
        patch.setattr(plan_cache, "execution_device", lambda model: torch.device("xpu"))
        assert key() != variants[0]
    monkeypatch.setattr(loaded.model.config, "_attn_implementation", "flash_attention_2")
    assert key() != variants[0]


@pytest.mark.parametrize("changed", ["generation_config.json", "processor_config.json"])
def test_the_key_follows_the_folders_files(tiny_llava, loaded, tmp_path, changed):
    folder = shutil.copytree(tiny_llava, tmp_path / "model")
    settings = json.loads((folder / changed).read_text())
    (folder / changed).write_text(json.dumps(settings | {"repetition_penalty": 1.3}))
    request = check_request("rtn", "w4a4", {})
    keys = [cache_key(one, request, None) for one in (loaded, load(str(folder), dtype="float32"))]
    assert keys[0] != keys[1]


def test_the_key_follows_the_package_of_a_step_that_is_named(loaded, monkeypatch, tmp_path):
    package = tmp_path / "their_method"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "search.py").write_text("raise AssertionError('imported before it is called')")
    monkeypatch.syspath_prepend(tmp_path)
    step = Step("theirs", imported("their_method.search:step"), lambda scheme, options: True)
    request = check_request("rtn", "w4a4", {})
    theirs = replace(request, method=replace(request.method, steps=(*request.method.steps, step)))
    first = cache_key(loaded, theirs, None)
    (package / "search.py").write_text("def step(context, draft): return context, draft")
    assert cache_key(loaded, theirs, None) not in (first, cache_key(loaded, request, None))
    assert step.run("model", "draft") == ("model", "draft")
    del sys.modules["their_method"], sys.modules["their_method.search"]


def test_a_plan_that_cannot_be_stored_is_an_error_and_one_that_is_there_is_read(tmp_path):
    plan = RoundingPlan("rtn", "w4a4", {}, "0" * 64, modules=(), tensors={"site/lower": torch.ones(3)})
    (tmp_path / "file").touch()
    with pytest.raises(QVLMError, match="file' cannot be written: ") as caught:
        cached_plan(tmp_path / "file" / "key", lambda workspace: pytest.fail("searched for nothing"))
    assert "\n" not in str(caught.value)
    assert cached_plan(tmp_path / "key", lambda workspace: plan).hash == plan.hash
    assert cached_plan(tmp_path / "key", lambda workspace: pytest.fail("searched again")).hash == plan.hash


def test_the_steps_of_an_interrupted_search_are_there_for_the_next(tmp_path):
    plan = RoundingPlan("rtn", "w4a4", {}, "0" * 64, modules=(), tensors={"site/lower": torch.ones(3)})

    def interrupted(workspace):
        workspace.keep("one", {"found": 1})
        raise KeyboardInterrupt

    def resumed(workspace):
        assert workspace.recall("one") == ({"found": 1}, {})
        return plan

    with pytest.raises(KeyboardInterrupt):
        cached_plan(tmp_path / "key", interrupted)
    assert cached_plan(tmp_path / "key", resumed).hash == plan.hash
    assert not (tmp_path / "key.steps").exists()
