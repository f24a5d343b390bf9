import copy
import json
import re
from pathlib import Path

import pytest
import torch
from kernel_problems import relative
from tiny_llava import logits_of, random_image

import qvlm_plugin as qvlm
from qvlm_plugin import planning
from qvlm_plugin.calibration import Sample
from qvlm_plugin.conversation import Conversation
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.linear import QuantLinear
from qvlm_plugin.plan_request import check_request


@pytest.fixture
def triples():
    return [(random_image(index), f"what is {index}?", f"answer {index}") for index in range(4)]


def test_a_plan_is_searched_saved_read_and_applied(loaded, triples, tmp_path):
    options = {"group_size": 16, "calibration_batch_size": 2}
    before = copy.deepcopy(loaded.model.state_dict())
    plan = qvlm.search(loaded.model, loaded.processor, "awq", "w4a8", triples, **options)
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.model.state_dict().items())
    request = check_request("awq", "w4a8", options)
    samples = qvlm.CalibrationSet(
        tuple(Sample(Conversation.from_prompt(question, [image]), answer) for image, question, answer in triples)
    )
    expected = planning.obtain_plan(loaded, request, samples, cache=None)
    assert plan.model != expected.model and plan.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(tensor, expected.tensors[name]) for name, tensor in plan.tensors.items())
    again = qvlm.RoundingPlan.load(plan.save(tmp_path / "plan"))
    assert qvlm.apply(again, loaded.model, backend="reference") is loaded.model
    assert any(isinstance(module, QuantLinear) for module in loaded.model.modules())
    with pytest.raises(QVLMError, match="made for another model"):
        qvlm.apply(again, loaded.model)


def test_a_model_is_quantized_in_one_line(loaded, triples):
    whole = copy.deepcopy(loaded.model)
    inputs = loaded.processor(images=[triples[0][0]], text=["<image> what?"], return_tensors="pt")
    model = qvlm.quantize(loaded.model, loaded.processor, "qvlm_rotated", "w8a8", triples, calibration_batch_size=2)
    assert 0 < relative(logits_of(model, inputs), logits_of(whole, inputs)) < 0.1


def test_a_file_names_samples(loaded, tmp_path):
    plan = qvlm.search(loaded.model, loaded.processor, "rtn", "w4a16")
    assert plan.method == "rtn" and plan.calibration is None
    with pytest.raises(QVLMError, match="no such file"):
        qvlm.search(loaded.model, loaded.processor, calibration=str(tmp_path / "none.json"))


def test_mistakes_are_one_line(loaded, triples):
    for arguments, message in (
        ({"method": "nothing"}, "nothing"),
        ({"colour": 3}, "unknown argument 'colour'"),
        ({}, "needs calibration data"),
        ({"calibration": triples}, "has 4 samples, fewer than calibration_batch_size=8"),
    ):
        with pytest.raises(QVLMError, match=message) as caught:
            qvlm.search(loaded.model, loaded.processor, **arguments)
        assert "\n" not in str(caught.value)
    with pytest.raises(QVLMError, match="is offloaded"):
        qvlm.search(copy.deepcopy(loaded.model).to("meta"), loaded.processor, "rtn", "w4a16")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        qvlm.nothing  # noqa: B018


def test_the_document_runs(tiny_llava, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = []
    for index in range(8):
        random_image(index).save(f"{index}.png")
        turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": f"answer {index}"}]
        rows.append({"image": f"{index}.png", "conversations": turns})
    Path("llava_mix.json").write_text(json.dumps(rows))
    text = (Path(__file__).parents[1] / "docs" / "python.md").read_text()
    first, *blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {"images": [random_image(index) for index in range(8)]}
    first = first.replace("path/to/llava", str(tiny_llava)).replace(":64", ":8")
    exec(first, names)
    assert any(isinstance(module, QuantLinear) for module in names["model"].modules())
    load_again = "".join(line for line in first.splitlines(True) if "quantize(" not in line)
    exec(load_again, names)
    for block in blocks[:2]:
        exec(block.replace(":64", ":8").replace("group_size=64", "group_size=16"), names)
    exec(load_again + blocks[2], names)
    assert names["plan"].method == "qlora"
