"""Checkpoints that other programs quantized: written here in each format by its own specification."""

import json
from functools import partial

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import pack_to_int32
from safetensors.torch import load_file, save_file
from tiny_llava import logits_of, randomized, write_tiny_llava
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    Dinov2Config,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from transformers.quantizers.quantizers_utils import should_convert_module

from qvlm_plugin import plugins
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.harness.model_size import packed_bytes
from qvlm_plugin.models import pre_quantized
from qvlm_plugin.models.loading import load, open_checkpoint
from qvlm_plugin.models.placement import empty_model
from qvlm_plugin.stored_bits import stored_facts, stored_kernels


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_tiny_llava(tmp_path_factory.mktemp("theirs") / "tiny", hidden=64)


def configured(folder, quantization):
    """The folder with a ``quantization_config``."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": quantization}))
    return folder


def write_tiny_dinov2(folder):
    """The tiny model with the demo's kind of tower, some of whose weights transformers splits when it reads them."""
    config = LlavaConfig.from_pretrained(write_tiny_llava(folder, hidden=64))
    config.vision_config = Dinov2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    randomized(LlavaForConditionalGeneration(config)).save_pretrained(folder)
    return folder


def compressed(folder, ignored, symmetric=True, group_size=16):
    """The folder with the decoder in 4 bits, packed as compressed-tensors does; and the weights that it stands for."""
    file, tensors, rounded = folder / "model.safetensors", load_file(folder / "model.safetensors"), {}
    for key in [key for key in tensors if "layers" in key and "language_model" in key and key.endswith("proj.weight")]:
        weight, name = tensors.pop(key).float(), key.removesuffix(".weight")
        groups = weight.unflatten(1, (-1, group_size))
        if symmetric:
            scale, zeros = groups.abs().amax(dim=-1) / 7, torch.zeros(groups.shape[:2])
        else:
            least, most = groups.amin(dim=-1), groups.amax(dim=-1)
            scale = (most - least) / 15
            zeros = (-8 - least / scale).round().clamp(-8, 7)
        codes = (groups / scale[..., None] + zeros[..., None]).round().clamp(-8, 7)
        rounded[name] = ((codes - zeros[..., None]) * scale[..., None]).flatten(1)
        tensors[f"{name}.weight_packed"] = pack_to_int32(codes.flatten(1).to(torch.int8), 4)
        tensors[f"{name}.weight_scale"], tensors[f"{name}.weight_shape"] = scale, torch.tensor(weight.shape)
        if not symmetric:
            assert zeros.any()
            tensors[f"{name}.weight_zero_point"] = pack_to_int32(zeros.to(torch.int8), 4, packed_dim=0).contiguous()
    save_file(tensors, file, {"format": "pt"})
    weights = {"num_bits": 4, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": group_size}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "format": "pack-quantized"}}
    quantization = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
    return configured(folder, quantization | {"quantization_status": "compressed", "ignore": ignored}), rounded


def ignored_names(source, prefix):
    model = load(str(source), dtype="float32").model
    names = [name for name, one in model.named_modules() if isinstance(one, torch.nn.Linear)]
    return [name.removeprefix(prefix) for name in names if "language_model" not in name]


def facts_of(loaded, method):
    return stored_facts(loaded.model, plugins.topology(loaded.model.config), method)


@pytest.mark.parametrize("write", [partial(write_tiny_llava, hidden=64), write_tiny_dinov2])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("prefix", ["", "model."])
def test_compressed_tensors_with_either_kind_of_ignored_names(tmp_path, capsys, prefix, symmetric, write, calibration):
    source = write(tmp_path / "source")
    folder, rounded = compressed(write(tmp_path / "x"), ignored_names(source, prefix), symmetric)
    loaded = load(str(folder), dtype="float32")
    said = "names that its quantization_config ignores are those of weight files" in capsys.readouterr().err
    assert said == bool(prefix)
    expected = load(str(source), dtype="float32")
    with torch.no_grad():
        for name, module in expected.model.named_modules():
            for key, value in rounded.items():
                if key.split("layers")[-1] == name.split("layers")[-1] and "language_model" in name:
                    module.weight.copy_(value)
    inputs, _ = next(calibration.batches(loaded.processor, 5))
    torch.testing.assert_close(logits_of(loaded.model, inputs), logits_of(expected.model, inputs), rtol=1e-4, atol=1e-4)
    facts = facts_of(loaded, "compressed-tensors")
    assert facts["bits"]["decoder"]["weight"] == pytest.approx(4 + (16 if symmetric else 20) / 16)
    assert facts["bits"]["vision"] == {"weight": 16, "activation": 16}
    assert facts["scheme"] == "w4a16+projector:w16a16+vision:w16a16" and facts["calibration"]["source"] == "unknown"
    assert stored_kernels(loaded.model) == {"compressed-tensors, dequantized": len(rounded)}
    assert packed_bytes(loaded.model) < packed_bytes(expected.model)


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_bitsandbytes_with_either_kind_of_skipped_names(source, tmp_path, calibration, prefix):
    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        # Its kernel for CPUs with bfloat16 instructions takes multiples of 32 outputs and 64 inputs.
        llm_int8_skip_modules=["lm_head", "model.vision_tower", "model.multi_modal_projector"],
    )
    model = AutoModelForImageTextToText.from_pretrained(source, quantization_config=how, dtype=torch.float32)
    model.save_pretrained(tmp_path / "x")
    AutoProcessor.from_pretrained(source).save_pretrained(tmp_path / "x")
    skipped = ["lm_head", f"{prefix}vision_tower", f"{prefix}multi_modal_projector"]
    stored = json.loads((tmp_path / "x" / "config.json").read_text())["quantization_config"]
    configured(tmp_path / "x", stored | {"llm_int8_skip_modules": skipped})
    loaded = load(str(tmp_path / "x"), dtype="float32")
    inputs, _ = next(calibration.batches(loaded.processor, 5))
    torch.testing.assert_close(logits_of(loaded.model, inputs), logits_of(model, inputs), rtol=1e-4, atol=1e-4)
    facts = facts_of(loaded, "bitsandbytes")
    assert facts["bits"]["decoder"] == {"weight": 4.5, "activation": 16}
    assert list(stored_kernels(loaded.model)) == ["bitsandbytes Linear4bit"]


@pytest.mark.parametrize(
    ("method", "missing"), [("awq", "gptqmodel"), ("gptq", "gptqmodel"), ("auto-round", "auto-round")]
)
def test_a_missing_package_is_named_before_weights_are_read(tmp_path, monkeypatch, method, missing):
    def nothing(name):
        raise pre_quantized.PackageNotFoundError(name)

    monkeypatch.setattr(pre_quantized, "version", nothing)
    folder = configured(write_tiny_llava(tmp_path / "x", hidden=64), {"quant_method": method, "bits": 4})
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        QVLMError, match=rf"quantized by {method}, which needs {missing} .* is not installed: pip inst.*qvlm_plugin\["
    ):
        open_checkpoint(str(folder))


def test_an_unknown_method_is_refused(tmp_path):
    folder = configured(write_tiny_llava(tmp_path / "x", hidden=64), {"quant_method": "theirs"})
    with pytest.raises(QVLMError, match=r"quant_method='theirs', which transformers cannot run; it can run .*awq"):
        open_checkpoint(str(folder))


def test_transforms_that_transformers_leaves_out_are_refused(tmp_path):
    folder, _ = compressed(write_tiny_llava(tmp_path / "x", hidden=64), [])
    stored = json.loads((folder / "config.json").read_text())["quantization_config"]
    configured(folder, stored | {"transform_config": {"config_groups": {"R": {"type": "hadamard", "apply": []}}}})
    with pytest.raises(QVLMError, match=r"transform_config, which transformers ignores"):
        open_checkpoint(str(folder))


DECODER = "model.language_model.layers"


def awq_folder(folder, left):
    """The model with its decoder's Linears in AWQ's format, by names only."""
    tensors = load_file(write_tiny_llava(folder, hidden=64) / "model.safetensors")
    names = {key: key.replace("proj.weight", "proj.qweight") if "language_model" in key else key for key in tensors}
    saved = {names[key]: tensor for key, tensor in tensors.items()}
    save_file(saved, folder / "model.safetensors", {"format": "pt"})
    return configured(folder, {"quant_method": "awq", "bits": 4, "modules_to_not_convert": left})


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (None, False),  # GPTQModel
        (["model.vision_tower.encoder", DECODER, "lm_head"], False),  # AutoRound, which quantized the blocks
        (["vision_tower", "multi_modal_projector"], False),  # older transformers
        (["model.vision_tower", "model.multi_modal_projector", "lm_head"], True),
    ],
)
def test_files_say_which_linears_are_quantized(tmp_path, capsys, left, right):
    folder = awq_folder(tmp_path / "x", left)
    config = LlavaConfig.from_pretrained(folder)
    pre_quantized.correct_unconverted(config, [folder / "model.safetensors"], False, "it")
    found = config.quantization_config["modules_to_not_convert"]
    assert ("modules_to_not_convert in its quantization_config does not fit" in capsys.readouterr().err) != right
    model = empty_model(config)
    linears = [name for name, one in model.named_modules() if isinstance(one, torch.nn.Linear)]
    converted = [name for name in linears if name != "lm_head" and should_convert_module(name, found)]
    assert converted == [name for name in linears if name.startswith(DECODER)]
    assert (found == left) == right


def test_files_without_a_quantized_weight_are_refused(tmp_path):
    stored = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    folder = configured(write_tiny_llava(tmp_path / "x", hidden=64), stored)
    with pytest.raises(QVLMError, match=r"quant_method='bitsandbytes', but its files hold no weight quantized by it"):
        load(str(folder), dtype="float32")


@pytest.mark.parametrize(
    "stored",
    [
        "awq",
        {"quant_method": "compressed-tensors", "ignore": 5},
        {"quant_method": "compressed-tensors", "transform_config": "x"},
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "block_name_to_quantize": 5},
    ],
)
def test_a_damaged_configuration_is_one_line(tmp_path, stored):
    folder = configured(write_tiny_llava(tmp_path / "x", hidden=64), stored)
    with pytest.raises(QVLMError, match=r"pretrained='.*': (its )?quantization_config ") as caught:
        open_checkpoint(str(folder))
    assert "\n" not in str(caught.value)
