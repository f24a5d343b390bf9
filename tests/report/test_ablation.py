import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from harness.mirrors import write_mirrors
from report.stub_harness import calls, write_stub
from searching import context_of
from tiny_llava import random_image, write_tiny_llava
from typer.testing import CliRunner

from qvlm_plugin.calibration import CalibrationSet, Sample
from qvlm_plugin.cli import app
from qvlm_plugin.conversation import Conversation
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.methods.hidden import block_inputs
from qvlm_plugin.methods.qvlm.dependency import Assignment, soft_assignment
from qvlm_plugin.models.loading import load
from qvlm_plugin.plan_request import check_request
from qvlm_plugin.planning import apply, obtain_plan
from qvlm_plugin.report.ablations.difference import sample_points
from qvlm_plugin.report.ablations.evaluation import Subject
from qvlm_plugin.report.ablations.figure2 import correlation
from qvlm_plugin.report.ablations.ladder import RUNGS
from qvlm_plugin.report.ablations.layer_errors import held_apart, layer_errors, relative_errors
from qvlm_plugin.report.ablations.table1 import planned_weight_bytes
from qvlm_plugin.report.results import Grid
from qvlm_plugin.report.writing import Report

DECODER_ONLY = "w4a4+vision:w16a16+projector:w16a16"
SMALL = {"calibration_batch_size": 1, "veo": False, "h0": 0.0}


def sample(index):
    return Sample(Conversation.from_prompt(f"what is {index}?" * (1 + index), [random_image(index)]), f"answer {index}")


@pytest.fixture
def samples():
    return CalibrationSet(tuple(map(sample, range(4))))


def request(scheme=DECODER_ONLY, **options):
    return check_request("qvlm", scheme, SMALL | options)


# Figure 2


@pytest.mark.parametrize("relative", [False, True])
def test_difference_and_dependency_are_those_of_the_method_on_the_sample(loaded, relative):
    """On a decoder of two layers the method with blocks of one and of two layers is the two searches."""
    asked = request(relative_error=relative)
    alone = CalibrationSet((sample(3),))
    (point,) = sample_points(loaded, asked.scheme, alone, asked.options, layer=0)
    outputs = {"dependency": "output", "h0": 0}
    records = [
        obtain_plan(loaded, request(relative_error=relative, max_depth=depth, **outputs), alone, None).record["cdm"]
        for depth in (1, 2)
    ]
    sequential, joint = (record["blocks"][-1]["error"] for record in records)
    assert [len(record["blocks"]) for record in records] == [2, 1]
    assert point.dependency == pytest.approx(records[0]["dependencies"][0], rel=1e-6)
    assert point.joint / point.sequential == pytest.approx(joint / sequential, rel=1e-6)
    context = context_of(loaded, alone, calibration_batch_size=1)
    hidden = block_inputs(context)
    for named in context.layers:
        hidden = hidden.through(*named)
    (states,) = hidden.states
    norm = states.shape[1] if relative else float(states.square().sum())
    assert point.joint == pytest.approx(joint / norm, rel=1e-5)


def test_points_of_several_samples(loaded, samples):
    asked = request(min_percentile=0.96, percentile_step=0.01)
    points = sample_points(loaded, asked.scheme, samples, asked.options, layer=0)
    assert len(points) == 4 and all(point.difference >= 0 for point in points)
    assert any(point.difference > 0 for point in points)
    context = context_of(loaded, samples, calibration_batch_size=1)
    outputs = block_inputs(context).through(*context.layers[0]).states
    lower, upper = torch.cat([states[0] for states in outputs]).aminmax(dim=0)
    for point, states in zip(points, outputs, strict=True):  # bounds are common, so that entropies compare
        marginal = soft_assignment(states, lower, upper, Assignment(4)).double().flatten(0, -2).mean(dim=0)
        assert point.entropy == pytest.approx(float(-(marginal * marginal.log()).sum()), rel=1e-5)
        assert 0 < point.entropy <= math.log(16) and 0 < point.dependency <= math.log(16)


def test_a_single_candidate_leaves_no_difference(loaded, samples):
    asked = request(min_percentile=1.0)
    points = sample_points(loaded, asked.scheme, samples, asked.options, layer=0)
    assert [point.difference for point in points] == [0.0] * 4 and all(point.joint > 0 for point in points)


def test_the_layer_must_have_a_following_one_and_rounded_activations(loaded, samples):
    with pytest.raises(QVLMError, match=r"layer=1: .* 0 to 0"):
        sample_points(loaded, request().scheme, samples, request().options, layer=1)
    with pytest.raises(QVLMError, match="must round the decoder's activations"):
        sample_points(loaded, request("w4a16").scheme, samples, request().options, layer=0)


def test_correlation():
    assert correlation([1, 2, 3, 4, 5], [2, 4, 6, 8, 10]).r == pytest.approx(1)
    found = correlation([1, 2, 3, 4, 5, 6], [2, 1, 4, 3, 6, 5])
    assert found.r == pytest.approx(29 / 35) and found.low < found.r < found.high and 0 < found.p < 0.05
    assert correlation([1, 2, 3, 4], [0, 0, 0, 0]).r is None


# Figure 3c


def test_relative_errors_leave_padding_out():
    torch.manual_seed(0)
    target, output = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    attended = torch.tensor([[False, True, True], [True, True, True]])
    found = relative_errors(output, target, attended)
    for row in range(2):
        kept = attended[row]
        difference = output[row, kept] - target[row, kept]
        distance, norm = difference.square().sum(dim=-1), target[row, kept].square().sum(dim=-1)
        assert found[0, row] == pytest.approx(float(distance.sum() / norm.sum()))
        assert found[1, row] == pytest.approx(float((distance / norm).mean()))


@torch.no_grad()
def test_layer_errors_are_those_of_the_quantized_model(tiny_llava, loaded, samples):
    plan = obtain_plan(loaded, request("w3a4", cdm=False), samples, None)
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    errors = layer_errors(loaded, plan, samples, batch_size=3)
    after = loaded.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert errors.whole.shape == errors.token.shape == (4, 2) and (errors.whole > 0).all()
    alone = layer_errors(loaded, plan, samples, batch_size=1)
    torch.testing.assert_close(errors.whole, alone.whole, rtol=1e-4, atol=0)
    torch.testing.assert_close(errors.token, alone.token, rtol=1e-4, atol=0)
    quantized = load(str(tiny_llava), dtype="float32")
    apply(plan, quantized)
    for index in range(4):
        (inputs, _), *_ = CalibrationSet((samples.samples[index],)).batches(loaded.processor, 1)
        x, y = (  # the last of these is normed, the one before it is the first layer's output
            model(**inputs, output_hidden_states=True).hidden_states[1] for model in (quantized.model, loaded.model)
        )
        assert errors.whole[index, 0] == pytest.approx(float((x - y).square().sum() / y.square().sum()), rel=1e-4)


def test_full_precision_has_no_layer_error(loaded, samples):
    plan = obtain_plan(loaded, request("w16a16"), samples, None)
    errors = layer_errors(loaded, plan, samples, batch_size=2)
    assert not errors.whole.any() and not errors.token.any()


def test_measured_samples_are_apart_from_fitted_ones(loaded, samples):
    plan = obtain_plan(loaded, request(cdm=False), CalibrationSet(samples.samples[1:3]), None)
    assert held_apart(samples, plan).samples == (samples.samples[0], samples.samples[3])
    with pytest.raises(QVLMError, match="no sample apart from those calibrated on"):
        held_apart(CalibrationSet(samples.samples[1:3]), plan)


# Table 1 and the sweeps


def test_planned_weight_bytes(tiny_llava, loaded):
    total = sum(parameter.nbytes for parameter in loaded.model.parameters())
    assert planned_weight_bytes(loaded, request("w16a16")) == total
    asked = request("w4a4", weights="int", group_size=-1, symmetric=True)
    layers = obtain_plan(loaded, check_request("rtn", "w4a16", {}), None, None).modules
    packed = [module.shape for module in layers if module.weight.kind != "none"]
    saved = sum(rows * columns * (4 - 0.5) - 2 * rows for rows, columns in packed)  # a 16-bit scale for each row
    shapes = load(str(tiny_llava), dtype="float32", device_map="meta")
    assert planned_weight_bytes(loaded, asked) == planned_weight_bytes(shapes, asked) == round(total - saved)


def test_cells_name_what_differs_from_the_defaults():
    subject = Subject("tiny", "quiz:train:8", ("quiz",), options={"eta": "2"}, model_args={"seed": "1"})
    cell = subject.cell("name", "w4a4", max_depth="3", veo="false")
    common = {"pretrained": "tiny", "method": "qvlm", "scheme": "w4a4", "calibration": "quiz:train:8", "seed": "1"}
    assert cell.model_args == common | {"eta": "2.0", "veo": "false"}
    assert subject.cell("other", "w4a4", max_depth="2").model_args == common | {"eta": "2.0", "max_depth": "2"}
    with pytest.raises(QVLMError, match="max_depth='0' is not allowed"):
        subject.cell("name", "w4a4", max_depth="0")
    with pytest.raises(QVLMError, match="unknown argument 'colour'"):
        Subject("tiny", "quiz:train:8", ("quiz",), options={"colour": "red"}).cell("name", "w4a4")


def invoke(*arguments, code=0):
    result = CliRunner().invoke(app, ["ablate", *map(str, arguments)])
    assert result.exit_code == code, result.output + str(result.exception)
    return result.output


def report(folder, name):
    """The rows and the document of a report, all of whose files are there."""
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (folder / f"{name}.svg").read_text()
    assert not [file for file in folder.iterdir() if file.name.startswith(".")]
    return json.loads((folder / f"{name}.json").read_text()), (folder / f"{name}.md").read_text()


def test_sweeps_share_runs_and_tell_failures(tmp_path, monkeypatch):
    """With a stub for the harness: a failed point is missing, told, and tried again; nothing else is run twice."""
    monkeypatch.setattr("sys.argv", ["qvlm", "ablate", "fig3a", "a folder"])
    place, output = write_stub(tmp_path / "place"), tmp_path / "report"
    common = [output, "--pretrained", "tiny", "--data", place, "--tasks", "quiz,exam", "--limit", 5]
    text = invoke("fig3a", *common, "--depths", "1,4,3", code=2)
    log = output / "runs" / "w4a4-max_depth-4" / "log.txt"
    assert f"w4a4-max_depth-4 ended without results: QVLMError: too deep; log: {log} (1 runs were not" in text
    assert not (output / "fig3a.md").exists() and len(calls(place)) == 2
    common.append("--keep-going")
    text = invoke("fig3a", *common, "--depths", "1,3,4", code=2)
    assert "1 runs failed" in text and str(output / "runs" / "w4a4-max_depth-4" / "log.txt") in text
    content, document = report(output, "fig3a")
    assert [row["value"] for row in content["rows"]] == [1, 3, 4]
    assert [row["search_seconds"] for row in content["rows"]] == [4, 64, None]
    assert [score["value"] for score in content["rows"][1]["scores"]] == [0.8, 0.8]
    assert "| max_depth | 1 | 4.0 | 60.0 ± 2.0 | 60.0 ± 2.0 |" in document and "failed | failed |" in document
    assert "Stand-in data" in document and "quiz 5, limited" in document and "1 of 3 runs failed" in document
    assert "$ qvlm ablate fig3a 'a folder'" in document
    assert len(calls(place)) == 4
    invoke("fig3a", *common, "--depths", "1,3,4", code=2)
    assert len(calls(place)) == 5 and "max_depth=4" in calls(place)[-1]
    invoke("fig3b", *common, "--percentiles", "0.99,0.98", "--etas", "0.5,1")
    rows = report(output, "fig3b")[0]["rows"]
    assert [(row["option"], row["value"]) for row in rows] == [
        ("min_percentile", 0.99),
        ("min_percentile", 0.98),
        ("eta", 0.5),
        ("eta", 1.0),
    ]
    assert len(calls(place)) == 7  # the defaults, max_depth=3, min_percentile=0.98 and eta=1, are one run
    assert "none of the 1 runs finished" in invoke("fig3a", *common, "--depths", "4", code=2)
    assert report(output, "fig3a")[0]["rows"] == content["rows"]
    before = len(calls(place))
    assert "max_depth='deep' is not allowed" in invoke("fig3a", *common, "--depths", "1,deep", code=2)
    assert len(calls(place)) == before


def test_the_ladder_pairs_each_rung_with_the_one_below(tmp_path, monkeypatch):
    """With a stub for the harness, to which rtn is a fifth of the documents worse than all else."""
    monkeypatch.setattr("sys.argv", ["qvlm", "ablate", "ladder", "a folder"])
    place, output = write_stub(tmp_path / "place"), tmp_path / "report"
    common = [output, "--pretrained", "tiny", "--data", place, "--tasks", "quiz,exam", "--limit", 50]
    invoke("ladder", *common, "--schemes", "w4a4,w3a3", "--seeds", "0,1")
    assert len(calls(place)) == 2 * 2 * len(RUNGS) and "seed=1" in calls(place)[1]
    content, document = report(output, "ladder")
    rows = [row for row in content["rows"] if row["scheme"] == "w3a3"]
    assert [row["rung"] for row in rows] == [rung.name for rung in RUNGS]
    worse = [rung.method == "rtn" for rung in RUNGS]
    for row, now, before in zip(rows, worse, [worse[0], *worse], strict=False):
        assert row["scores"] == pytest.approx([0.6 if now else 0.8] * 2)
        assert row["differences"] == pytest.approx([(before - now) * 0.2] * 2)
    assert "| w4a4 | + rotation, per token | 2 | 60.0 ± " in document and "-20.0 [" in document
    assert "w3a3: rotation, per token is 20.0 points below the rung below" in document and "+20.0 [" in document
    assert "Stand-in data" in document and "w4a4: GPTQ cannot be told apart from the rung below" in document
    invoke("ladder", *common, "--schemes", "w4a4", "--seeds", "1,2")
    assert len(calls(place)) == 5 * len(RUNGS)
    assert "is not of whole numbers" in invoke("ladder", *common, "--seeds", "0,one", code=2)


@pytest.mark.parametrize("scheme", ["w4a4", "w8a8", "w4a16"])
def test_each_rung_changes_what_its_name_says(scheme):
    chosen = [check_request(rung.method, scheme, dict(rung.options)).options for rung in RUNGS]
    changed = [
        {name for name, value in options.model_dump().items() if value != below.model_dump()[name]}
        for below, options in itertools.pairwise(chosen)
    ]
    assert changed[0] == {"transform", "activations", "observer"}
    assert changed[1] == {"rounding", "weights", "group_size", "weight_clip"}
    assert changed[2] == {"center", "bias_correction"}
    assert {"transform", "smooth_by"} <= changed[3] and changed[4] == {"cdm"} and changed[5] == {"veo"}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with a model, mirrors of the data sets and calibration files."""
    monkeypatch.setenv("QVLM_CACHE", str(tmp_path / "qvlm-cache"))
    directory = write_mirrors(tmp_path / "place")
    write_tiny_llava(directory / "tiny")
    rows = []
    for index in range(12):
        random_image(index).save(directory / f"{index}.png")
        turns = [{"from": "human", "value": f"<image>\nwhat is {index}?"}, {"from": "gpt", "value": f"it is {index}"}]
        rows.append({"image": f"{index}.png", "conversations": turns})
    (directory / "train.json").write_text(json.dumps(rows))
    return directory


def test_table1_is_measured_by_the_harness_and_resumes(place, tmp_path, monkeypatch, warm_python):
    output = tmp_path / "report"
    command = ["table1", output, "--pretrained", "tiny", "--data", place, "--calibration", "train.json:4"]
    command += ["--schemes", "w3a3", "--tasks", "vizwiz_vqa_val", "--limit", 2, "--model-args", "dtype=float32"]
    for option in ("calibration_batch_size=4", "min_percentile=0.99", "veo_epochs=1"):
        command += ["--option", option]
    invoke(*command)
    content, document = report(output, "table1")
    rows = {row["method"]: row for row in content["rows"]}
    assert [*rows] == ["full precision", "baseline", "+CDM", "+VEO", "Q-VLM"]
    assert rows["full precision"]["search_seconds"] is None
    assert all(rows[name]["search_seconds"] > 0 for name in ("baseline", "+CDM", "+VEO", "Q-VLM"))
    assert len({row["weight_bytes"] for row in rows.values()}) == 2
    assert rows["Q-VLM"]["weight_bytes"] < rows["full precision"]["weight_bytes"]
    runs = [json.loads(Path(row["results"]).read_text())["qvlm"] for row in rows.values()]
    assert len({run["plan_hash"] for run in runs}) == 5
    assert [(run["options"]["cdm"], run["options"]["veo"]) for run in runs[1:]] == [
        (False, False),
        (True, False),
        (False, True),
        (True, True),
    ]
    for row in rows.values():
        (score,) = row["scores"]
        assert (score["task"], score["documents"], score["limited"]) == ("vizwiz_vqa_val", 2, True)
        assert 0 <= score["value"] <= 1 and score["stderr"] is not None and row["stand_in"]
    assert "Stand-in data" in document and "vizwiz_vqa_val 2, limited" in document

    monkeypatch.setattr("qvlm_plugin.report.runs.command", lambda *_, **__: pytest.fail("a finished run was run again"))
    invoke(*command)
    assert report(output, "table1") == (content, document)


def test_figures_2_and_3c_need_no_evaluation(place, tmp_path):
    output = tmp_path / "report"
    (place / "stand_in.json").write_text("{}")
    common = [output, "--pretrained", "tiny", "--data", place, "--option", "calibration_batch_size=4"]
    text = invoke("fig2", *common, "--calibration", "train.json:6", "--dtype", "float32")
    assert text.splitlines()[-1] == str(output / "fig2.md")
    content, document = report(output, "fig2")
    assert len(content["rows"]) == 6
    for row in content["rows"]:
        assert row["ded"] == row["sequential_error"] - row["joint_error"] >= 0
    assert "decoder layer 0" in document and "Stand-in data" in document
    options = ["--option", "veo=false", "--option", "h0=0", "--calibration", "train.json:4", "--depths", "1,2"]
    invoke("fig3c", *common, *options, "--held-out", "train.json:12", "--dtype", "float32")
    content, document = report(output, "fig3c")
    assert [(row["max_depth"], row["layer"]) for row in content["rows"]] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert all(row["error"] > row["stderr"] > 0 for row in content["rows"])
    assert len({row["plan_hash"] for row in content["rows"]}) == 2 and "over 8 samples" in document
    assert len({row["search_seconds"] for row in content["rows"]}) == 2 and "by max_depth: 1: " in document


# Writing


def test_an_interrupted_report_leaves_the_old_one_whole(tmp_path, monkeypatch):
    def made(title):
        return Report("name", title, "qvlm", [Grid(("a",), (("1",),))], [{"a": 1}], [], {"png": title.encode()})

    made("old").write(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert before.keys() == {"name.md", "name.json", "name.png"}

    def fail(*_):
        raise OSError("no space")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(QVLMError, match="no space"):
        made("new").write(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
