"""A checkpoint whose parts do not fit together is found when it is opened, before its weights, its data or a search."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import write_tiny_llava_next, write_tiny_llava_onevision, write_tiny_qwen2_5_vl
from tiny_llava import CHAT_TEMPLATE

from qvlm_plugin.doctor.space import check_space
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.models.loading import load, open_checkpoint
from qvlm_plugin.scheme import Scheme


@pytest.fixture
def folder(tiny_llava, tmp_path):
    return shutil.copytree(tiny_llava, tmp_path / "model")


def change(file, edit):
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


def processor(folder, **values):
    change(folder / "processor_config.json", lambda content: content.update(values))


def image_size(folder, size):
    crop = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    change(folder / "processor_config.json", lambda content: content["image_processor"].update(crop))


def no_special_tokens(folder):
    def remove(content):
        for name in ("pad_token", "eos_token"):
            content.pop(name, None)

    change(folder / "tokenizer_config.json", remove)


def feature_layer(folder, layer):
    change(folder / "config.json", lambda content: content.update(vision_feature_layer=layer))


def template(folder, text):
    (folder / "chat_template.jinja").write_text(text)


WRONG = {
    "no patch size": (lambda folder: processor(folder, patch_size=None), "processor_config.json has no patch_size"),
    "another patch size": (lambda folder: processor(folder, patch_size=7), "writes 16 image tokens.* gives 4 features"),
    "the class token kept": (
        lambda folder: processor(folder, vision_feature_select_strategy="full"), "writes 5 image tokens.* gives 4",
    ),
    "another image size": (lambda folder: image_size(folder, 56), "does not take the processor's images: .*28"),
    "no token to pad with": (no_special_tokens, "names neither pad_token nor eos_token"),
    "a layer that the tower has not": (lambda folder: feature_layer(folder, 9), "vision_feature_layer=9 is outside"),
    "one of several": (lambda folder: feature_layer(folder, [-1, -9]), r"vision_feature_layer=\[-1, -9\] is outside"),
    "a template for text": (
        lambda folder: template(folder, "{% for message in messages %}{{ 'USER: ' + message['content'] }}{% endfor %}"),
        "cannot be encoded",
    ),
    "a template without images": (
        lambda folder: template(folder, CHAT_TEMPLATE.replace("'<image>'", "''")),
        "(no image token: the chat template|0 <image> tokens)",
    ),
    "another image token": (
        lambda folder: change(folder / "config.json", lambda content: content.update(image_token_index=9)),
        "no image token: .*image_token_index=9",
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_parts_that_do_not_fit_are_found_by_the_small_files(folder, wrong):
    edit, message = WRONG[wrong]
    open_checkpoint(str(folder))
    edit(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(QVLMError, match=rf"pretrained='{folder}'.*{message}") as caught:
        open_checkpoint(str(folder))
    assert "\n" not in str(caught.value)
    (finding, *_) = check_space({"pretrained": str(folder)}, Scheme.parse("w4a4"))  # of qvlm doctor
    assert finding.status == "fail" and str(caught.value) == finding.message


@pytest.mark.parametrize("write", [write_tiny_llava_next, write_tiny_llava_onevision, write_tiny_qwen2_5_vl])
def test_families_pass_and_are_found_out(tmp_path, write):
    folder = write(tmp_path / "model")
    opened = open_checkpoint(str(folder))
    assert opened.processor.tokenizer.padding_side == "left"
    wrong = {"patch_size": 7, "num_image_tokens": 5}
    processor(folder, **{name: value for name, value in wrong.items() if hasattr(opened.processor, name)})
    if (
        write is write_tiny_qwen2_5_vl
    ):  # whose tower looks at values, so that its features are counted with weights only
        change(folder / "processor_config.json", lambda content: content["image_processor"].update(merge_size=1))
    with pytest.raises(QVLMError, match=r"image tokens|cannot be answered"):
        load(str(folder))


def test_a_model_that_fails_on_an_image_is_found_when_it_is_loaded(folder, monkeypatch):
    def no_luck(*_, **__):
        raise ValueError("no luck")

    monkeypatch.setattr("transformers.LlamaModel.forward", no_luck)
    with pytest.raises(QVLMError, match="a prompt with an image cannot be answered: no luck"):
        load(str(folder))


def test_a_model_that_overflows_is_found_when_it_is_loaded(folder):
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("layers.1.mlp.down_proj.weight") and "language" in name)
    save_file({**weights, name: weights[name] * 2e5}, folder / "model.safetensors", {"format": "pt"})
    assert load(str(folder), dtype="float32")
    with pytest.raises(
        QVLMError, match=r"language_model.layers.1.mlp.down_proj (is|are) not finite in float16; use dtype="
    ):
        load(str(folder), dtype="float16")


def test_the_dry_run_draws_no_random_numbers(folder):
    change(folder / "generation_config.json", lambda content: content.update(do_sample=True, temperature=0.2))
    torch.manual_seed(3)
    state = torch.get_rng_state()
    load(str(folder))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("steered", [{"stop_strings": ["x"]}, {"num_return_sequences": 2, "do_sample": True}])
def test_what_evaluation_does_not_follow_keeps_no_model_from_loading(folder, steered):
    change(folder / "generation_config.json", lambda content: content.update(steered))
    config = load(str(folder), dtype="float32").model.generation_config
    assert {name: getattr(config, name) for name in steered} == steered
