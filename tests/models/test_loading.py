import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_llava import CHAT_TEMPLATE, write_tiny_llava
from transformers import LlavaForConditionalGeneration

from qvlm_plugin import plugins
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.models.loading import _fingerprint, load


@pytest.fixture
def folder(tiny_llava, tmp_path):
    return shutil.copytree(tiny_llava, tmp_path / "model")


def fails(folder, message, **arguments):
    with pytest.raises(QVLMError, match=message) as caught:
        load(str(folder), **arguments)
    assert "\n" not in str(caught.value)


def test_a_loaded_model_is_the_checkpoint_ready_to_run(tiny_llava):
    loaded = load(str(tiny_llava), dtype="bfloat16")
    plain = LlavaForConditionalGeneration.from_pretrained(tiny_llava, dtype=torch.bfloat16)
    assert not loaded.model.training and loaded.model.dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(loaded.model.parameters(), plain.parameters(), strict=True))
    assert loaded.processor.tokenizer.padding_side == "left"
    assert type(loaded.processor.image_processor).__name__ == "CLIPImageProcessorPil"


def test_the_fingerprint_follows_the_content_not_the_place(tiny_llava, folder, tmp_path):
    assert load(str(folder)).fingerprint == load(str(tiny_llava)).fingerprint
    assert load(str(write_tiny_llava(tmp_path / "other", seed=1))).fingerprint != load(str(folder)).fingerprint


def edit_json(name, **changes):
    def edit(folder):
        file = folder / name
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return edit


def edit_pixels(folder):
    settings = json.loads((folder / "processor_config.json").read_text())
    settings["image_processor"]["image_mean"] = [0.5, 0.5, 0.5]
    (folder / "processor_config.json").write_text(json.dumps(settings))


def write(name, text):
    def edit(folder):
        file = folder / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)

    return edit


@pytest.mark.parametrize(
    "edit",
    [
        edit_json("generation_config.json", repetition_penalty=1.3),
        edit_json("tokenizer_config.json", model_max_length=77),
        edit_json("tokenizer.json", truncation=None, padding=None, version="1.1"),
        edit_pixels,
        write("chat_template.jinja", CHAT_TEMPLATE.replace("ASSISTANT", "MODEL")),
        write("additional_chat_templates/tools.jinja", CHAT_TEMPLATE),
        write("special_tokens_map.json", "{}"),
        write("merges.txt", ""),
        write("modeling_own.py", ""),
    ],
)
def test_the_fingerprint_follows_all_that_answers_depend_on(tiny_llava, folder, edit):
    before = _fingerprint([folder], [folder / "model.safetensors"], {})
    assert before == load(str(tiny_llava)).fingerprint
    edit(folder)
    assert _fingerprint([folder], [folder / "model.safetensors"], {}) != before


def test_the_fingerprint_leaves_out_what_no_answer_depends_on(tiny_llava, folder):
    write("README.md", "A model.")(folder)
    write("checkpoint-500/trainer_state.json", "{}")(folder)
    assert load(str(folder)).fingerprint == load(str(tiny_llava)).fingerprint


def test_sharded_checkpoints_load_and_a_missing_shard_is_named(folder, tiny_llava):
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="60KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1 and load(str(folder)).fingerprint != load(str(tiny_llava)).fingerprint
    shards[1].unlink()
    fails(folder, f"missing {shards[1].name}")


def test_missing_files_are_named(folder, tmp_path):
    fails(tmp_path / "absent", "no such folder")
    fails("nobody/nothing-at-all", "neither a folder nor a hub model")
    fails(folder, "dtype='int3' is not known; allowed are auto, float32", dtype="int3")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    fails(folder, r"missing model\.safetensors; weights are read from safetensors files only")
    (folder / "config.json").unlink()
    fails(folder, r"config\.json is missing")


def test_keys_that_do_not_match_are_never_silently_initialised(folder):
    file = folder / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if name.endswith("mlp.down_proj.weight"))
    save_file({key: tensor for key, tensor in weights.items() if key != name}, file, {"format": "pt"})
    fails(folder, "1 weights are missing in the checkpoint, for example .*down_proj")
    save_file({**weights, "model.stranger.weight": torch.ones(2)}, file, {"format": "pt"})
    fails(folder, "1 weights are unknown to the model, for example .*stranger")
    save_file({**weights, name: torch.ones(3, 3)}, file, {"format": "pt"})
    fails(folder, "do not load|of another shape")
    file.write_bytes(file.read_bytes()[:1000])
    fails(folder, "weights do not load")


def test_folders_without_a_usable_processor_are_named(folder):
    (folder / "chat_template.jinja").unlink()
    fails(folder, "no chat template")
    (folder / "tokenizer.json").unlink()
    fails(folder, "the processor does not load")


@torch.inference_mode()
def test_an_offloaded_model_is_the_same_with_its_weights_elsewhere(tiny_llava):
    loaded, plain = load(str(tiny_llava), device_map="offload"), load(str(tiny_llava))
    assert all(parameter.is_meta for parameter in loaded.model.parameters()) and not loaded.model.training
    assert loaded.fingerprint == plain.fingerprint and loaded.model.dtype == plain.model.dtype
    inputs = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    assert torch.equal(loaded.model(**inputs).logits, plain.model(**inputs).logits)
    assert all(parameter.is_meta for parameter in loaded.model.parameters())


def test_placements_that_there_are_not_are_named(tiny_llava):
    fails(tiny_llava, "weights do not load: .*device_map", device_map="everywhere")


def test_a_configuration_can_be_refused_before_the_weights(folder):
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["model_type"] = "siglip_vision_model"
    config["text_config"]["model_type"] = "gpt2"
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"not read")
    fails(folder, "language model 'gpt2': known language models are", check_config=plugins.topology)


def test_a_broken_configuration_is_named(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "unheard-of"}))
    fails(folder, r"config\.json does not load")


def test_code_that_comes_with_a_checkpoint_is_named(folder):
    config = json.loads((folder / "config.json").read_text())
    code = {"model_type": "unheard-of", "auto_map": {"AutoConfig": "code.Config"}}
    (folder / "config.json").write_text(json.dumps(config | code))
    fails(folder, "transformers does not know model_type='unheard-of', whose code comes with it; .* trust_remote_code=")
