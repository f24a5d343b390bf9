"""Folders in the compressed-tensors format, read back by transformers with the package of that name."""

import json
from dataclasses import replace

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import pack_to_int32
from kernel_problems import relative
from rotations import rotated
from safetensors.torch import load_file
from stored_codes import with_codes
from tiny_llava import logits_of, write_tiny_llava
from transformers import AutoModelForImageTextToText
from typer.testing import CliRunner

from qvlm_plugin import planning
from qvlm_plugin.cli import app
from qvlm_plugin.compressed_tensors import export_compressed_tensors, pack_words
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.models.loading import load
from qvlm_plugin.plan_request import check_request


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_tiny_llava(tmp_path_factory.mktemp("compressed") / "tiny", hidden=64)


def plan_of(loaded, calibration, scheme, **options):
    request = check_request("rtn", scheme, {"calibration_batch_size": 5, **options})
    return planning.obtain_plan(loaded, request, calibration, cache=None)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(3, 32), (5, 40), (2, 9)])
def test_words_are_packed_as_the_package_does(bits, shape):
    torch.manual_seed(0)
    codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8)
    signed = (codes.int() - 2 ** (bits - 1)).to(torch.int8)
    assert torch.equal(pack_words(codes, bits), pack_to_int32(signed, bits))


@pytest.mark.parametrize(
    ("scheme", "options", "formats", "bound"),
    [
        ("w4a16", {"group_size": 8}, {"pack-quantized"}, 1e-5),
        ("w4a16", {"group_size": 8, "symmetric": True}, {"pack-quantized"}, 1e-5),
        ("w8a16", {"symmetric": True}, {"pack-quantized"}, 1e-5),
        ("w8a8", {"group_size": 32}, {"int-quantized"}, 0.1),
        (
            "w4a16+vision:w8a8+projector:w16a16",
            {"group_size": 32, "symmetric": True},
            {"pack-quantized", "int-quantized"},
            0.1,
        ),
    ],
)
def test_transformers_reads_the_same_model(source, tmp_path, calibration, scheme, options, formats, bound):
    loaded = load(str(source), dtype="float32")
    plan = plan_of(loaded, calibration, scheme, **options)
    counts = export_compressed_tensors(plan, loaded, tmp_path / "x")
    assert counts.keys() == formats and sum(counts.values()) == len(plan.quantized)
    loaded = load(str(source), dtype="float32")
    planning.apply(plan, loaded)
    inputs, _ = next(calibration.batches(loaded.processor, 5))
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "x")
    expected = logits_of(loaded.model, inputs)
    assert relative(logits_of(model, inputs), expected) < bound
    full = relative(logits_of(load(str(source), dtype="float32").model, inputs), expected)
    assert full > 2 * bound or formats != {"pack-quantized"}  # and not by being the model in full precision

    config = json.loads((tmp_path / "x" / "config.json").read_text())["quantization_config"]
    groups = config["config_groups"].values()
    assert {group["format"] for group in groups} == formats
    assert config["format"] == (next(iter(formats)) if len(formats) == 1 else "mixed-precision")
    assert "lm_head" in config["ignore"] and config["qvlm"]["plan_hash"] == plan.hash
    for group in groups:
        tokens = group["input_activations"]
        assert (tokens is not None) == (group["format"] == "int-quantized")
        assert tokens is None or (tokens["strategy"], tokens["dynamic"]) == ("token", True)
    stored = load_file(tmp_path / "x" / "model.safetensors")
    dtypes = {str(tensor.dtype) for name, tensor in stored.items() if name.endswith(("weight_packed", "q_proj.weight"))}
    assert ("torch.int32" in dtypes) == ("pack-quantized" in formats)
    assert ("torch.int8" in dtypes) == ("int-quantized" in formats)


@pytest.mark.parametrize(
    ("scheme", "options"),
    [("w4a16", {"group_size": 8}), ("w8a16", {"symmetric": True}), ("w8a8", {"group_size": 32})],
)
def test_the_plans_codes_are_written(source, tmp_path, calibration, scheme, options):
    loaded = load(str(source), dtype="float32")
    nearest = plan_of(loaded, calibration, scheme, **options)
    plan, values = with_codes(nearest, loaded)
    export_compressed_tensors(plan, load(str(source), dtype="float32"), tmp_path / "x")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "x")
    expected = load(str(source), dtype="float32")
    planning.apply(plan, expected)
    inputs, _ = next(calibration.batches(expected.processor, 5))
    bound = 0.1 if scheme == "w8a8" else 1e-5
    assert relative(logits_of(model, inputs), logits_of(expected.model, inputs)) < bound
    if scheme == "w4a16":  # transformers dequantizes these while it loads
        for name, value in values.items():
            torch.testing.assert_close(model.get_parameter(f"{name}.weight"), value)


@pytest.mark.parametrize(
    ("scheme", "options", "reason"),
    [
        ("w4a4", {}, r"w4a4 is neither w8a8 nor w4a16 or w8a16"),
        ("w3a16", {}, r"weights of 3 bits; 4 and 8 can be served"),
        ("w4a16", {"weights": "nf"}, r"nf4.* is not a weight of integers"),
        ("w4a16", {"group_size": 20}, r"groups of 20 do not divide its 24 input features"),
        ("w16a16", {}, r"quantizes nothing"),
        ("w4a16+vision:w8a8", {}, r"asymmetric .* --option symmetric=true"),
    ],
)
def test_what_the_format_cannot_express_is_refused(source, tmp_path, calibration, scheme, options, reason):
    loaded = load(str(source), dtype="float32")
    plan = plan_of(loaded, calibration, scheme, **options)
    before = list(loaded.model.modules())
    with pytest.raises(QVLMError, match=reason) as caught:
        export_compressed_tensors(plan, loaded, tmp_path / "x")
    assert "\n" not in str(caught.value)
    assert list(loaded.model.modules()) == before and not list(tmp_path.iterdir())


def test_rotations_are_refused(source, tmp_path, calibration):
    loaded = load(str(source), dtype="float32")
    plan = rotated(plan_of(loaded, calibration, "w4a16", group_size=8))
    before = list(loaded.model.modules())
    with pytest.raises(QVLMError, match=r"cannot express the plan: it rotates the inputs of model\.vision_t") as caught:
        export_compressed_tensors(plan, loaded, tmp_path / "x")
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())
    assert list(loaded.model.modules()) == before


def test_what_does_not_run_is_not_written(source, tmp_path, calibration):
    """A model that is finite in float16 as it is, and as the plan changes it is not."""
    loaded = load(str(source), dtype="float16")
    name = "model.language_model.norm"
    value = torch.full_like(loaded.model.get_parameter(f"{name}.weight"), 6e4)
    plan = plan_of(loaded, calibration, "w4a16", group_size=8)
    plan = replace(plan, replaced=(f"{name}.weight",), tensors={**plan.tensors, f"{name}.weight/value": value})
    with pytest.raises(QVLMError, match=rf"the quantized model is not written.*{name} is not finite in float16"):
        export_compressed_tensors(plan, loaded, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_the_command_says_what_differs(source, tmp_path):
    arguments = ["export", tmp_path / "x", "--pretrained", source, "--format", "compressed-tensors", "--method", "rtn"]
    done = CliRunner().invoke(app, [*map(str, arguments), "--scheme", "w4a16", "--option", "group_size=8"])
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[-2:] == [
        "quantized Linear layers by format: pack-quantized 28",
        str(tmp_path / "x"),
    ]
