"""Folders in the compressed-tensors format, read back by transformers with the package of that name."""

import json
from dataclasses import replace

import pytest
import torch
from compressed_tensors.transform import TransformBase, TransformConfig, apply_transform_config
from compressed_tensors.utils.match import match_name
from kernel_problems import relative
from rotations import rotated
from safetensors.torch import load_file
from stored_codes import with_codes
from tiny_llava import logits_of, write_tiny_llava
from transformers import AutoModelForImageTextToText
from typer.testing import CliRunner

from qvlm_plugin import planning
from qvlm_plugin.cli import app
from qvlm_plugin.compressed_tensors import export_compressed_tensors
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.formats import ActivationFormat
from qvlm_plugin.models.loading import load
from qvlm_plugin.plan_request import check_request
from qvlm_plugin.rotation import rotation_of


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_tiny_llava(tmp_path_factory.mktemp("compressed") / "tiny", hidden=64)


def plan_of(loaded, calibration, scheme, **options):
    request = check_request("rtn", scheme, {"calibration_batch_size": 5, **options})
    return planning.obtain_plan(loaded, request, calibration, cache=None)


def as_served(plan, source):
    """The model that a folder stands for: inputs that are rounded are so per token, by their largest magnitude."""
    loaded = load(str(source), dtype="float32")
    modules = [module.model_copy(update={"activation": ActivationFormat()}) for module in plan.modules]
    planning.apply(replace(plan, modules=tuple(modules)), loaded)
    for module in plan.quantized:
        layer = loaded.model.get_submodule(module.name)
        if module.activation.kind != "none":
            layer.rotated = lambda x, turn=layer.rotated: round_tokens(turn(x))
    return loaded


def round_tokens(x):
    step = x.abs().amax(dim=-1, keepdim=True).clamp_min(1e-9) / 127.5
    return (x / step).round().clamp(-128, 127) * step


@pytest.mark.parametrize(
    ("scheme", "options", "formats", "bound"),
    [
        ("w4a16", {"group_size": 8}, {"pack-quantized"}, 1e-5),
        ("w4a16", {"group_size": 8, "symmetric": True}, {"pack-quantized"}, 1e-5),
        ("w8a16", {"symmetric": True}, {"pack-quantized"}, 1e-5),
        ("w8a8", {"group_size": -1, "symmetric": True}, {"int-quantized"}, 1e-4),
        ("w4a8", {"group_size": 8, "symmetric": True}, {"pack-quantized"}, 1e-4),
        (
            "w4a16+vision:w8a8+projector:w16a16",
            {"group_size": -1, "symmetric": True},
            {"pack-quantized", "int-quantized"},
            1e-4,
        ),
    ],
)
def test_transformers_reads_the_same_model(source, tmp_path, calibration, scheme, options, formats, bound):
    loaded = load(str(source), dtype="float32")
    plan = plan_of(loaded, calibration, scheme, **options)
    counts = export_compressed_tensors(plan, loaded, tmp_path / "x")
    assert {group.format for group in counts} == formats and sum(counts.values()) == len(plan.quantized)
    loaded = as_served(plan, source)
    inputs, _ = next(calibration.batches(loaded.processor, 5))
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "x")
    expected = logits_of(loaded.model, inputs)
    assert relative(logits_of(model, inputs), expected) < bound
    full = relative(logits_of(load(str(source), dtype="float32").model, inputs), expected)
    assert full > 10 * bound  # and not by being the model in full precision

    config = json.loads((tmp_path / "x" / "config.json").read_text())["quantization_config"]
    groups = config["config_groups"].values()
    assert {group["format"] for group in groups} == formats
    assert config["format"] == (next(iter(formats)) if len(formats) == 1 else "mixed-precision")
    assert "lm_head" in config["ignore"] and config["qvlm"]["plan_hash"] == plan.hash
    for group in groups:
        tokens = group["input_activations"]
        assert (tokens is not None) == any(found.rounds_tokens for found in counts if found.format == group["format"])
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
        ("w4a4", {}, r"w4a4 is none of w4a16, w8a16, w4a8, w8a8"),
        ("w3a16", {}, r"w3a16 is none of"),
        ("w4a16", {"weights": "nf"}, r"nf4.* is not a weight of integers"),
        ("w4a16", {"group_size": 20}, r"groups of 20 do not divide its 24 input features"),
        ("w16a16", {}, r"quantizes nothing"),
        ("w4a8", {"group_size": 8}, r"asymmetric and its inputs rounded; .* --option symmetric=true"),
        ("w4a16+vision:w8a8", {}, r"asymmetric, and .* --option symmetric=true"),
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


@pytest.mark.parametrize(("scheme", "bound"), [("w4a16", 1e-5), ("w8a8", 5e-3), ("w4a8", 5e-3)])
def test_rotations_are_the_packages_transforms(source, tmp_path, calibration, scheme, bound):
    """transformers leaves them out; `apply_transform_config` is what reads them in the package."""
    loaded = load(str(source), dtype="float32")
    options = {"group_size": -1, "symmetric": True, "activations": "token"}
    plan = plan_of(loaded, calibration, f"{scheme}+vision:w16a16+projector:w16a16", **options)
    plan = with_rotations(plan, {module.site for module in plan.quantized})
    export_compressed_tensors(plan, loaded, tmp_path / "x")
    loaded = as_served(plan, source)
    inputs, _ = next(calibration.batches(loaded.processor, 5))
    expected = logits_of(loaded.model, inputs)

    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "x")
    assert relative(logits_of(model, inputs), expected) > 0.1
    config = json.loads((tmp_path / "x" / "config.json").read_text())["quantization_config"]["transform_config"]
    apply_transform_config(model, TransformConfig.model_validate(config))
    stored = {name: t for name, t in load_file(tmp_path / "x" / "model.safetensors").items() if "rotation_" in name}
    widths = {module.shape[1] for module in plan.quantized}
    assert len(stored) == len(widths)
    assert all(set(matrix.unique().tolist()) == {-1.0, 1.0} for matrix in stored.values())
    transforms = {name: module for name, module in model.named_modules() if isinstance(module, TransformBase)}
    assert len(transforms) == len(plan.quantized)
    for transform in transforms.values():
        transform.weight.data = next(matrix for matrix in stored.values() if len(matrix) == len(transform.weight))
    # A last digit of a rotated input can be another code of 8 bits.
    assert relative(logits_of(model, inputs), expected) < bound


def test_transforms_match_names_of_vllm(source, tmp_path, calibration):
    loaded = load(str(source), dtype="float32")
    plan = plan_of(loaded, calibration, "w4a16+vision:w16a16+projector:w16a16", group_size=-1)
    sites = {module.site for module in plan.quantized}
    export_compressed_tensors(with_rotations(plan, sites), loaded, tmp_path / "x")
    config = json.loads((tmp_path / "x" / "config.json").read_text())["quantization_config"]["transform_config"]
    patterns = [target for group in config["config_groups"].values() for target in group["apply"][0]["targets"]]
    for module in plan.modules:
        theirs = module.name.replace("model.language_model.", "language_model.model.")
        for name in (module.name, theirs):
            matching = [pattern for pattern in patterns if match_name(name, pattern)]
            assert len(matching) == (not module.is_identity), name


@pytest.mark.parametrize(
    ("scheme", "scaled", "reason"),
    [
        ("w4a16+vision:w16a16+projector:w16a16", True, r"scaled before they are rotated.*--option transform=rotate"),
        ("w4a16", False, r"vision_tower\S+: its inputs are rotated, which vLLM can do in the decoder only; leave the "),
    ],
)
def test_other_rotations_are_refused(source, tmp_path, calibration, scheme, scaled, reason):
    loaded = load(str(source), dtype="float32")
    plan = plan_of(loaded, calibration, scheme, group_size=8)
    sites = {module.site for module in plan.quantized}
    plan = rotated(plan, sites) if scaled else with_rotations(plan, sites)
    before = list(loaded.model.modules())
    with pytest.raises(QVLMError, match=rf"--format compressed-tensors cannot express model\..*{reason}") as caught:
        export_compressed_tensors(plan, loaded, tmp_path / "x")
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())
    assert list(loaded.model.modules()) == before


def test_biases_of_rotated_inputs_are_refused(source, tmp_path, calibration):
    loaded = load(str(source), dtype="float32")
    plan = plan_of(loaded, calibration, "w4a16+vision:w16a16+projector:w16a16", group_size=8)
    module = plan.quantized[-1]
    loaded.model.get_submodule(module.name).bias = torch.nn.Parameter(torch.zeros(module.shape[0]))
    with pytest.raises(QVLMError, match=rf"{module.name}: its inputs are rotated and it has a bias"):
        export_compressed_tensors(with_rotations(plan, {module.site}), loaded, tmp_path / "x")


def with_rotations(plan, sites):
    """The plan with a rotation of each site, without scales."""
    widths = {module.site: module.shape[1] for module in plan.modules if module.site in sites}
    return replace(plan, rotations=tuple(rotation_of(site, width) for site, width in widths.items()))


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
        "quantized Linear layers by format: pack-quantized w4a16 28",
        str(tmp_path / "x"),
    ]
