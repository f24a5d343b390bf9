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
from qvlm_plugin.methods.options import MethodOptions
from qvlm_plugin.methods.qvlm.dependency import Assignment, soft_assignment
from qvlm_plugin.models.loading import load
from qvlm_plugin.plan_request import check_request
from qvlm_plugin.planning import apply, obtain_plan
from qvlm_plugin.report.ablations.difference import sample_points
from qvlm_plugin.report.ablations.figure2 import correlation
from qvlm_plugin.report.ablations.layer_errors import layer_errors, relative_errors, unseen_samples
from qvlm_plugin.report.compare.grid import GRIDS, cells, read_grid
from qvlm_plugin.report.paired import AVERAGE
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
    with pytest.raises(QVLMError, match="layer=1 is not allowed; allowed are 0 to 0"):
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


def test_measured_samples_exclude_calibration_samples(loaded, samples):
    plan = obtain_plan(loaded, request(cdm=False), CalibrationSet(samples.samples[1:3]), None)
    assert unseen_samples(samples, plan).samples == (samples.samples[0], samples.samples[3])
    with pytest.raises(QVLMError, match="calibrated on all samples of"):
        unseen_samples(CalibrationSet(samples.samples[1:3]), plan)


# Grids that come with the package


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


@pytest.mark.parametrize("name", [file.stem for file in GRIDS.iterdir()])
def test_a_grid_is_known_by_name_and_names_its_report(name):
    grid = read_grid(Path(name), {})
    assert grid.name == name and grid.title
    assert len({str(sorted(one.cell.model_args.items())) for one in cells(grid) if one.task == "scienceqa"}) == len(
        [one for one in cells(grid) if one.task == "scienceqa"]
    )  # no two rows are the same run


def test_table_1_of_the_paper_precedes_the_deviations():
    grid = read_grid(Path("table1"), {"schemes": ("w4a4",)})
    options = {name: check_request(grid.row(name)[0], "w4a4", grid.row(name)[1]).options for name in grid.methods}
    paper = MethodOptions().model_dump() | options["Q-VLM"].model_dump()
    assert {name: (one.cdm, one.veo) for name, one in list(options.items())[:4]} == {
        "baseline": (False, False), "+CDM": (True, False), "+VEO": (False, True), "Q-VLM": (True, True),
    }  # fmt: skip
    for one in list(options.values())[:4]:
        assert one.model_dump() | {"cdm": True, "veo": True} == paper and not one.relative_error
    assert all(one.relative_error and one.max_percentile > 1 for one in list(options.values())[4:])


@pytest.mark.parametrize("scheme", ["w4a4", "w8a8", "w4a16"])
def test_each_rung_changes_the_named_option(scheme):
    grid = read_grid(Path("ladder"), {})
    chosen = [check_request(*(method, scheme, options)).options for method, options in map(grid.row, grid.methods)]
    changed = [
        {name for name, value in options.model_dump().items() if value != below.model_dump()[name]}
        for below, options in itertools.pairwise(chosen)
    ]
    assert changed[0] == {"transform", "activations", "observer"}
    assert changed[1] == {"rounding", "weights", "group_size", "weight_clip"}
    assert changed[2] == {"center", "bias_correction"}
    assert {"transform", "smooth_by"} <= changed[3]
    assert changed[4:7] == [{"cdm", "max_depth"}, {"max_depth"}, {"veo"}]
    assert changed[7] == {
        "center", "bias_correction", "veo", "token_bounds", "max_percentile", "percentile_step", "group_scales",
    }  # fmt: skip
    assert chosen[-1] == check_request("qvlm_rotated", scheme, {}).options


def test_the_ladder_pairs_each_rung_with_the_one_before(tmp_path, monkeypatch):
    """With a stub for the harness, to which rtn is a fifth of the documents worse than all else."""
    monkeypatch.setattr("sys.argv", ["qvlm", "ablate", "ladder", "a folder"])
    place, output = write_stub(tmp_path / "place"), tmp_path / "report"
    common = [output, "--data", place, "--tasks", "pope,gqa", "--limit", 50]
    text = invoke("ladder", *common, "--schemes", "w4a4,w3a3", "--seeds", "0,1")
    assert "w3a3 is 20.0 points below qlora" in text
    # Tasks, full precision, schemes, seeds, rungs; nearest rounding per token needs no calibration, so it runs once.
    assert len(calls(place)) == 2 * (1 + 2 * (2 * 8 + 1))
    content, document = report(output, "ladder")
    rows = [row for row in content["over_seeds"] if row["scheme"] == "w3a3" and row["task"] == AVERAGE]
    names = [row["method"] for row in rows]
    assert len(names) == 9 and names[:2] == ["qlora", "+ rotation, per token"]
    assert names[-2:] == ["+ VEO", "qvlm_rotated"]
    assert [row["baseline"] for row in rows] == ["none", *names[:-1]]
    worse = [False, True, True, True, False, False, False, False, False]
    for row, now, before in zip(rows, worse, [None, *worse], strict=False):
        assert row["scores"] == pytest.approx([0.6 if now else 0.8] * 2)
        assert row["differences"] == pytest.approx([-0.2 if before is None else (before - now) * 0.2] * 2)
    assert "from the row above with the same scheme and seed" in document and "Stand-in data" in document
    invoke("ladder", *common, "--schemes", "w4a4", "--seeds", "1,2")
    assert len(calls(place)) == 2 * (1 + 5 * 8 + 2)
    assert "--seeds: input should be a valid integer" in invoke("ladder", *common, "--seeds", "0,one", code=2)


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


def test_an_interrupted_report_keeps_the_old_one(tmp_path, monkeypatch):
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
