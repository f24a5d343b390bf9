"""A family that the package does not know, described by another package as docs/add-a-family.md says: ViP-LLaVA."""

import re
import types
from pathlib import Path

import pytest
import torch
from tiny_families import write_tiny_vip_llava
from tiny_llava import logits_of, random_image
from typer.testing import CliRunner

from qvlm_plugin import builtin, planning, plugins
from qvlm_plugin.cli import app
from qvlm_plugin.conversation import Conversation, encode
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.harness.wrapper import QVLMChat
from qvlm_plugin.models.loading import load
from qvlm_plugin.plan import RoundingPlan
from qvlm_plugin.plan_request import check_request
from qvlm_plugin.topology import linear_layers, resolve

PAGE = Path(__file__).parents[1] / "docs" / "add-a-family.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_vip_llava(tmp_path_factory.mktemp("vip") / "model")


@pytest.fixture
def described(monkeypatch):
    """The page's own example as a plugin."""
    (code,) = re.findall(r"```python\n(from qvlm_plugin\.hooks.*?)```", PAGE.read_text(), re.DOTALL)
    module = types.ModuleType("my_family")
    exec(code, module.__dict__)
    manager = plugins.create_manager(builtin, module)
    monkeypatch.setattr(plugins, "plugin_manager", lambda: manager)


def test_without_a_plugin_it_is_refused_before_its_weights(folder):
    with pytest.raises(QVLMError, match=r"'vipllava' is not supported; .*docs/add-a-family\.md"):
        load(str(folder), check_config=plugins.topology)


def test_the_page_shows_what_is_traced(folder):
    shown = CliRunner().invoke(app, ["trace", str(folder)])
    assert shown.exit_code == 0, shown.output
    assert f"```python\n{shown.stdout}```" in PAGE.read_text()


def test_an_evaluation_traces_it(folder, described):
    arguments = {"pretrained": str(folder), "dtype": "float32", "device": "cpu", "method": "rtn", "scheme": "w4a16"}
    traced, by_hand = (QVLMChat(**arguments, cache=None, topology=topology) for topology in ("traced", "described"))
    assert traced.record.facts["plan_hash"] == by_hand.record.facts["plan_hash"]
    assert {"vision", "projector", "decoder"} <= traced.record.facts["bits"].keys()


def test_a_search_traces_it(folder, calibration, tmp_path, monkeypatch):
    monkeypatch.setenv("QVLM_CACHE", str(tmp_path / "cache"))
    search = ["search", str(tmp_path / "plan"), "--pretrained", str(folder), "--method", "rtn", "--scheme", "w4a16"]
    refused = CliRunner().invoke(app, [*search, "--topology", "guessed"])
    assert refused.exit_code == 2 and "topology='guessed' is not known; allowed are" in refused.stderr
    searched = CliRunner().invoke(app, [*search, "--topology", "traced"])
    assert searched.exit_code == 0, searched.output
    kinds = {module.name: module.part for module in RoundingPlan.load(tmp_path / "plan").modules}
    assert kinds["model.multi_modal_projector.linear_1"] == "projector"


def test_linears_of_a_group_read_the_same_tensor(folder, described):
    loaded = load(str(folder), dtype="float32")
    sites = resolve(plugins.topology(loaded.model.config), loaded.model)
    assert {name for site in sites for name in site.linears} == set(linear_layers(loaded.model)) - {"lm_head"}
    seen = {}
    for name, module in linear_layers(loaded.model).items():
        module.register_forward_pre_hook(lambda module, inputs, name=name: seen.update({name: inputs[0]}))
    inputs, _ = encode(loaded.processor, [Conversation.from_prompt("a", [random_image(0, 56)])])
    loaded.model(**inputs)
    assert all(seen[name] is seen[site.name] for site in sites for name in site.linears)


@pytest.mark.parametrize("method", ["rtn", "qlora", "awq", "qvlm", "qvlm_jacobian"])
def test_every_method_runs_on_it(folder, described, method, calibration):
    loaded = load(str(folder), dtype="float32", check_config=plugins.topology)
    inputs, _ = encode(loaded.processor, [sample.conversation for sample in calibration.samples])
    exact = logits_of(loaded.model, inputs)
    options = {"min_percentile": 0.99, "percentile_step": 0.01, "veo_epochs": 1} if "qvlm" in method else {}
    request = check_request(method, "w8a8", {**options, "calibration_batch_size": 5})
    plan = planning.obtain_plan(loaded, request, calibration, None)
    planning.apply(plan, loaded)
    logits = logits_of(loaded.model, inputs)
    assert 0 < float((logits - exact).norm() / exact.norm()) < 0.15
    assert {module.part for module in plan.modules} == {"vision", "projector", "decoder", "other"}
    answer = loaded.model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert torch.equal(answer[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
