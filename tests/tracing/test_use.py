"""A family that nobody described, with topology=traced wherever a topology is needed: Aya Vision."""

import json

import pytest
import torch
from harness.mirrors import write_conversations
from harness.test_wrapper import ask, texts
from tiny_families import write_tiny_aya_vision
from tiny_llava import logits_of, random_image
from transformers import AutoModelForImageTextToText, AutoProcessor
from typer.testing import CliRunner

import qvlm_plugin as qvlm
from qvlm_plugin.cli import app
from qvlm_plugin.conversation import Conversation, encode
from qvlm_plugin.doctor.needs import open_skeleton
from qvlm_plugin.doctor.run_memory import run_memory
from qvlm_plugin.doctor.search_memory import check_search_memory
from qvlm_plugin.doctor.space import check_space
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.harness.wrapper import QVLMChat
from qvlm_plugin.linear import QuantLinear
from qvlm_plugin.models.loading import open_checkpoint
from qvlm_plugin.plan_request import check_request
from qvlm_plugin.scheme import Scheme
from qvlm_plugin.tracing.trace import trace

OPTIONS = {
    "min_ratio": 0.9,
    "min_percentile": 0.95,
    "percentile_step": 0.05,
    "veo_epochs": 1,
    "calibration_batch_size": 2,
}
DOCUMENTS = [{"text": f"what is number {n}?", "images": [random_image(n, 40)] if n else []} for n in range(3)]
UNKNOWN = "model type 'aya_vision' is not supported; .*topology=traced finds the parts"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the model, calibration samples, and a plan that the command line searched."""
    folder = tmp_path_factory.mktemp("use")
    write_tiny_aya_vision(folder / "model")
    write_conversations(folder / "train.json", range(4), folder)
    write_conversations(folder / "apart.json", range(10, 14), folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QVLM_CACHE", str(folder / "cache"))
        command("search", folder / "plan", *model_in(folder), "--method", "qvlm", *calibration_in(folder))
        yield folder


def command(*arguments):
    done = CliRunner().invoke(app, [*map(str, arguments)])
    assert done.exit_code == 0, done.output
    return done.stdout


def model_in(place):
    return "--pretrained", place / "model", "--topology", "traced", "--dtype", "float32"


def calibration_in(place):
    options = [part for name, value in OPTIONS.items() for part in ("--option", f"{name}={value}")]
    return "--calibration", f"{place / 'train.json'}:4", *options


def answers(**arguments):
    model = QVLMChat(dtype="float32", device="cpu", batch_size=3, **arguments)
    return texts(model.generate_until(ask(model, DOCUMENTS, max_new_tokens=4)))


def test_a_saved_plan_and_an_exported_model_need_no_topology(place, tmp_path):
    model, plan = str(place / "model"), str(place / "plan")
    searched = {"method": "qvlm", "calibration": f"{place / 'train.json'}:4", **OPTIONS}
    expected = answers(pretrained=model, topology="traced", **searched)
    assert answers(pretrained=model, plan=plan) == expected
    command("export", tmp_path / "packed", "--pretrained", model, "--plan", plan, "--dtype", "float32")
    packed = answers(pretrained=model, plan=plan, backend="packed")
    assert answers(pretrained=str(tmp_path / "packed")) == packed
    with pytest.raises(QVLMError, match=UNKNOWN):
        answers(pretrained=model, method="rtn")


def test_plans_are_shown_and_drawn(place, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert "model.multi_modal_projector.linear_1" in command("inspect", place / "plan", "--modules")
    command("plot", place / "plan", "--output", tmp_path, *model_in(place), "--held-out", f"{place / 'apart.json'}:4")
    assert {"search.png", "veo.png", "errors.png"} <= {file.name for file in tmp_path.iterdir()}


def test_the_papers_figures_are_drawn(place, tmp_path):
    command("ablate", "fig2", tmp_path, *model_in(place), *calibration_in(place))
    assert len(json.loads((tmp_path / "fig2.json").read_text())["rows"]) == 4
    depths = ("--held-out", f"{place / 'apart.json'}:4", "--depths", "1")
    command("ablate", "fig3c", tmp_path, *model_in(place), *calibration_in(place), *depths)
    assert {row["layer"] for row in json.loads((tmp_path / "fig3c.json").read_text())["rows"]} == {0, 1}


def test_in_python(place, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(place / "model")
    processor = AutoProcessor.from_pretrained(place / "model")
    triples = [(random_image(n, 40), "what is it?", "a key") for n in range(2)]
    given = {"method": "awq", "scheme": "w4a8", "calibration": triples, "calibration_batch_size": 2, "alpha_steps": 2}
    with pytest.raises(QVLMError, match=UNKNOWN):
        qvlm.search(model, processor, **given)
    with pytest.raises(QVLMError, match="topology='guessed' is not known; allowed are described, traced"):
        qvlm.search(model, processor, **given, topology="guessed")
    plan = qvlm.search(model, processor, **given, topology="traced")
    found = trace(open_checkpoint(str(place / "model")))
    own = qvlm.search(model, processor, **given, topology=found)
    assert plan.tensors.keys() == own.tensors.keys()
    assert all(torch.equal(tensor, own.tensors[name]) for name, tensor in plan.tensors.items())
    inputs, _ = encode(processor, [Conversation.from_prompt("what?", [random_image(0, 40)])])
    exact = logits_of(model, inputs)
    quantized = qvlm.quantize(model, processor, "rtn", "w8a16", topology="traced")
    assert isinstance(quantized.model.vision_tower.encoder.layers[0].mlp.fc1, QuantLinear)
    assert 0 < float((logits_of(quantized, inputs) - exact).norm() / exact.norm()) < 0.1


def test_memory_and_disk_are_told(place):
    opening = {"pretrained": str(place / "model"), "topology": "traced"}
    request = check_request("qvlm", "w4a4", {})
    assert all(finding.subject != "checkpoint" for finding in check_space(opening, Scheme.parse("w4a4")))
    assert "lp " in check_search_memory(opening, request, 8, 100)[0].message
    assert run_memory(open_skeleton(opening), {**opening, "calibration": "file.json:8"}, request).evaluation > 0
    (described, *_) = check_space({"pretrained": opening["pretrained"]}, Scheme.parse("w4a4"))
    assert described.status == "fail" and "topology=traced" in described.message
