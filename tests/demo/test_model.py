import io
import json
import shutil
import sys
import tempfile
import time
from importlib import resources

import onnx
import pytest
import torch
from gguf import GGUFReader, dequantize
from onnx.reference import ReferenceEvaluator
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoProcessor,
    Dinov2Model,
    LlamaModel,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from qvlm_plugin.demo import parts
from qvlm_plugin.demo.data import mirrors
from qvlm_plugin.demo.model import GGUF, LOW_RANK_SCALE, ONNX, RECORD, assemble, build, vision_tower
from qvlm_plugin.demo.questions import SCIENCEQA, VIZWIZ, VQAV2, Picture, example, png
from qvlm_plugin.errors import QVLMError

SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
IMAGE, ASK = {"type": "image"}, "<|im_start|>assistant\n"


def text(words):
    return {"type": "text", "text": words}


def picture(number=0):
    return Image.open(io.BytesIO(png(Picture("test", number))))


@pytest.fixture(scope="module")
def model(demo_model):
    return LlavaForConditionalGeneration.from_pretrained(demo_model, dtype=torch.bfloat16).eval()


@pytest.fixture(scope="module")
def processor(demo_model):
    return AutoProcessor.from_pretrained(demo_model)


@pytest.fixture(scope="module")
def backbone_graph():
    """The ONNX file's model, for an independent reading of it."""
    return onnx.load_model_from_string((parts.locate(parts.VISION) / "models" / ONNX).read_bytes())


def test_is_a_stock_llava_that_loads_without_a_missing_key(demo_model):
    model, info = LlavaForConditionalGeneration.from_pretrained(demo_model, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert isinstance(model.model.vision_tower, Dinov2Model)
    assert isinstance(model.model.language_model, LlamaModel)
    assert model.dtype == torch.bfloat16
    assert (model.config.vision_feature_layer, model.config.vision_feature_select_strategy) == (-2, "default")
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    generation = model.generation_config
    assert (generation.do_sample, generation.eos_token_id, generation.pad_token_id) == (False, 2, 2)


def test_no_file_has_a_path_of_the_machine_that_built_it(demo_model):
    """Else two builds of the same parts would have different fingerprints, and plans would not fit both."""
    texts = {file.name: file.read_text() for file in demo_model.iterdir() if file.suffix != ".safetensors"}
    assert "config.json" in texts and not [name for name, text in texts.items() if tempfile.gettempdir() in text]


def test_processor_reloads_as_it_was(processor, model):
    assert isinstance(processor, LlavaProcessor)
    assert (processor.patch_size, processor.num_additional_image_tokens) == (14, 1)
    assert processor.tokenizer.padding_side == "left"
    assert processor.tokenizer.pad_token_id == 2
    assert processor.image_token_id == model.config.image_token_id == 4
    assert processor.tokenizer.convert_tokens_to_ids(["<image>", "<|im_end|>", "<file_sep>"]) == [4, 2, 5]
    assert len(processor.tokenizer) == model.config.text_config.vocab_size == 49152
    pixels = processor.image_processor(images=[picture()], return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 112, 112)


def test_both_image_backends_give_the_same_pixels_but_for_rounding(demo_model, processor):
    pil = AutoProcessor.from_pretrained(demo_model, backend="pil").image_processor
    for number in range(4):
        ours, other = (
            p(images=[picture(number)], return_tensors="pt")["pixel_values"] for p in (pil, processor.image_processor)
        )
        assert (ours - other).abs().max() < 1.1 / 255 / 0.224  # one grey level
        assert (ours - other).abs().mean() < 1e-3


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([("user", "Hi")], "<|im_start|>user\nHi<|im_end|>\n"),
        ([("user", [text("Hi")])], "<|im_start|>user\nHi<|im_end|>\n"),
        ([("user", [IMAGE, text("What?")])], "<|im_start|>user\n<image>\nWhat?<|im_end|>\n"),
        ([("user", "<image>\nWhat?")], "<|im_start|>user\n<image>\nWhat?<|im_end|>\n"),
        ([("user", [text("A "), IMAGE, text("B")])], "<|im_start|>user\nA <image>\nB<|im_end|>\n"),
        ([("user", [IMAGE, IMAGE, text("Q")])], "<|im_start|>user\n<image>\n<image>\nQ<|im_end|>\n"),
        (
            [("user", [IMAGE, text("Q")]), ("assistant", [text("red")]), ("user", "And?")],
            "<|im_start|>user\n<image>\nQ<|im_end|>\n<|im_start|>assistant\nred<|im_end|>\n"
            "<|im_start|>user\nAnd?<|im_end|>\n",
        ),
    ],
)
def test_chat_template(processor, messages, expected):
    turns = [{"role": role, "content": content} for role, content in messages]
    assert processor.apply_chat_template(turns, add_generation_prompt=True) == SYSTEM + expected + ASK
    assert processor.apply_chat_template(turns) == SYSTEM + expected
    own = [{"role": "system", "content": "Be brief."}, *turns]
    assert processor.apply_chat_template(own) == "<|im_start|>system\nBe brief.<|im_end|>\n" + expected


def test_every_image_becomes_64_tokens(processor):
    for count in (0, 1, 3):
        turn = [{"role": "user", "content": [IMAGE] * count + [text("What?")]}]
        prompt = processor.apply_chat_template(turn, add_generation_prompt=True)
        inputs = processor(text=[prompt], images=[picture(i) for i in range(count)] or None, return_tensors="pt")
        assert (inputs["input_ids"] == 4).sum() == 64 * count
        assert ("pixel_values" in inputs) == (count > 0)


def evaluate(model, start, end, value):
    """The tensor named `end`, computed by ONNX's reference evaluator with the tensor named `start` given as `value`."""
    makers = {name: node for node in model.graph.node for name in node.output}
    wanted, pending = set(), [end]
    while pending:
        name = pending.pop()
        if name != start and name in makers and id(makers[name]) not in wanted:
            wanted.add(id(makers[name]))
            pending += makers[name].input
    nodes = [node for node in model.graph.node if id(node) in wanted]
    info = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in (start, end)]
    graph = onnx.helper.make_graph(nodes, "part", info[:1], info[1:], model.graph.initializer)
    part = onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    return torch.from_numpy(ReferenceEvaluator(part).run(None, {start: value.numpy()})[0])


def test_tower_blocks_agree_with_the_onnx_graph(backbone_graph):
    tower = vision_tower()
    states = torch.randn(1, 9, 384, generator=torch.Generator().manual_seed(0))
    start, end = "/backbone/embeddings/Add_output_0", "/backbone/layernorm/Add_1_output_0"
    expected = evaluate(backbone_graph, start, end, states)
    with torch.no_grad():
        for layer in tower.encoder.layer:
            states = layer(states)
        states = tower.layernorm(states)
    torch.testing.assert_close(states, expected, atol=1e-4, rtol=1e-3)


def test_tower_embeddings_agree_with_the_onnx_graph(backbone_graph):
    pixels = torch.randn(1, 3, 112, 112, generator=torch.Generator().manual_seed(1))
    expected = evaluate(backbone_graph, "input_image", "/backbone/embeddings/Concat_1_output_0", pixels)
    tower, original = vision_tower(), vision_tower(518)  # 518 px: the ONNX file's own 37×37 positions
    with torch.no_grad():
        got = tower.embeddings(pixels) - tower.embeddings.position_embeddings
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
        # Resizing the positions once and storing them equals what DINOv2 does at every forward pass.
        torch.testing.assert_close(tower(pixels).last_hidden_state, original(pixels).last_hidden_state)


def test_language_model_is_the_published_one_plus_the_merged_update(model, tmp_path):
    (tmp_path / GGUF).write_bytes((parts.locate(parts.LANGUAGE) / GGUF).read_bytes())
    published = {
        tensor.name: torch.from_numpy(dequantize(tensor.data, tensor.tensor_type))
        for tensor in GGUFReader(tmp_path / GGUF).tensors
        if tensor.name in ("blk.7.ffn_down.weight", "token_embd.weight")
    }
    bridge = load_file(resources.files("qvlm_plugin.demo") / "bridge.safetensors")
    name = "model.language_model.layers.7.mlp.down_proj"
    update = bridge[f"{name}.lora_b"].float() @ bridge[f"{name}.lora_a"].float()
    assert update.norm() > 0
    merged = published["blk.7.ffn_down.weight"] + LOW_RANK_SCALE * update
    weights = model.state_dict()
    assert torch.equal(weights[f"{name}.weight"], merged.bfloat16())
    assert torch.equal(weights["model.language_model.embed_tokens.weight"], published["token_embd.weight"].bfloat16())


def test_a_finished_build_is_reused_and_a_stale_one_replaced(demo_model, model, processor, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    shutil.copytree(demo_model, folder)
    start = time.perf_counter()
    assert build(folder) == folder
    assert time.perf_counter() - start < 5
    record = json.loads((folder / RECORD).read_text())
    (folder / RECORD).write_text(json.dumps(record | {"bridge_sha256": "0" * 64}))
    (folder / "left over").touch()
    monkeypatch.setattr("qvlm_plugin.demo.model.assemble", lambda bridge: (model, processor))
    build(folder)
    assert json.loads((folder / RECORD).read_text()) == record
    assert not (folder / "left over").exists()


def test_refuses_a_folder_of_something_else_and_a_missing_bridge(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(QVLMError, match="not a demo model"):
        build(tmp_path)
    with pytest.raises(QVLMError, match="there is no bridge"):
        build(tmp_path / "new", bridge=tmp_path / "none.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(QVLMError, match="is not a bridge"):
        build(tmp_path / "new", bridge=tmp_path / "other.safetensors")
    assert not (tmp_path / "new").exists()


def test_names_the_extra_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(QVLMError, match=r"gguf not installed; run: pip install 'qvlm_plugin\[demo\]'"):
        assemble(None)


def test_answers_stand_in_questions(demo_model, processor):
    """Greedy answers to 8 documents of each benchmark: well above guessing, which gets at most 4 in 10."""
    by_id = {mirror.hub_id.split("/")[1]: mirror.splits for mirror in mirrors()}
    asked = [example(SCIENCEQA, doc) for doc in by_id["ScienceQA"]["ScienceQA-FULL", "test"][:8]]
    asked += [example(VIZWIZ, doc) for doc in by_id["VizWiz-VQA"]["default", "val"][:8]]
    asked += [example(VQAV2, doc) for doc in by_id["VQAv2"]["default", "validation"][:8]]
    model = LlavaForConditionalGeneration.from_pretrained(demo_model, dtype=torch.float32)
    right = 0
    for start in range(0, len(asked), 8):
        batch = asked[start : start + 8]
        prompts = [
            processor.apply_chat_template(
                [{"role": "user", "content": [IMAGE] * bool(item.picture) + [text(item.prompt)]}],
                add_generation_prompt=True,
            )
            for item in batch
        ]
        images = [Image.open(io.BytesIO(png(item.picture))) for item in batch if item.picture]
        inputs = processor(text=prompts, images=images or None, padding=True, return_tensors="pt")
        with torch.inference_mode():
            tokens = model.generate(**inputs, max_new_tokens=8)[:, inputs["input_ids"].shape[1] :]
        answers = processor.batch_decode(tokens, skip_special_tokens=True)
        right += sum(answer == item.answer for answer, item in zip(answers, batch, strict=True))
    assert right / len(asked) > 0.85
