import io
from collections import defaultdict

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_llava import write_tiny_llava
from torch import nn
from transformers import AutoProcessor, LlavaForConditionalGeneration

from qvlm_plugin.demo import train as training
from qvlm_plugin.demo.model import CHAT_TEMPLATE, LOW_RANK_SCALE
from qvlm_plugin.demo.questions import Picture, held_out, official, png
from qvlm_plugin.demo.train import LowRank, Recipe, Rows, logits, pack


@pytest.fixture(scope="module")
def rows():
    return Rows(official("train"), Recipe())


def test_rows_are_drawn_by_seed_and_step_and_never_show_held_out_pictures(rows):
    again = Rows(official("train"), Recipe())
    assert rows.at(3) == again.at(3) != rows.at(4)
    assert rows.at(3) != Rows(official("train"), Recipe(seed=1)).at(3)
    sources = set()
    for step in range(0, 560, 7):
        drawn = rows.at(step)
        assert len(drawn) == Recipe().images_per_step
        for row in drawn:
            shown = {item.picture for item in row if item.picture}
            assert len(shown) == 1
            assert row[0].picture
            sources |= {picture.source for picture in shown}
            assert not {picture.number for picture in shown if picture.source == "train"} & held_out()
    assert sources == {"train", "empty"}
    for index in range(16):
        for _, item in rows.held_out(index):
            assert item.picture is None or item.picture.source == "empty" or item.picture.number in held_out()


def test_packed_questions_equal_questions_asked_one_by_one(demo_model, rows):
    model = LlavaForConditionalGeneration.from_pretrained(demo_model, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(demo_model)
    row = [item for _, item in rows.held_out(1)]
    shown = next(item.picture for item in row if item.picture)
    image = Image.open(io.BytesIO(png(shown)))
    with torch.no_grad():
        pixels = processor.image_processor(images=[image], return_tensors="pt")["pixel_values"]
        states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][0, 1:]
        packed = logits(model, {shown: states}, pack(processor.tokenizer, [row, row[:2]]))
        at = 0
        for item in [*row, *row[:2]]:
            content = [{"type": "image"}] * bool(item.picture) + [{"type": "text", "text": item.prompt}]
            prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
            inputs = processor(
                text=[f"{prompt}{item.answer}<|im_end|>"], images=[image] if item.picture else None, return_tensors="pt"
            )
            length = len(processor.tokenizer(item.answer).input_ids) + 1
            alone = model(**inputs).logits[0, -length - 1 : -1]
            torch.testing.assert_close(packed[at : at + length], alone, atol=2e-3, rtol=1e-3)
            at += length
    assert at == len(packed)


def test_training_writes_a_bridge_and_examines_it_on_held_out_images(tmp_path, monkeypatch, capsys):
    folder = write_tiny_llava(tmp_path / "model")
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    processor.tokenizer.chat_template = CHAT_TEMPLATE
    monkeypatch.setattr(training, "assemble", lambda bridge: (model, processor))
    monkeypatch.setattr(training, "_features", lambda *_: defaultdict(lambda: torch.ones(64, 24)))
    before = model.model.multi_modal_projector.linear_1.weight.clone()
    output = training.train(tmp_path / "bridge", Recipe(steps=2, align_steps=1, images_per_step=1, warmup_steps=1))
    bridge = load_file(output)
    assert not torch.equal(bridge["model.multi_modal_projector.linear_1.weight"], before.half())
    assert any(tensor.any() for name, tensor in bridge.items() if name.endswith(".lora_b"))
    assert "step 2: held-out images: scienceqa" in capsys.readouterr().err
    assert not output.with_name("bridge.checkpoint").exists()


def test_low_rank_equals_the_merged_linear():
    torch.manual_seed(0)
    linear = nn.Linear(24, 40, bias=False)
    module = LowRank(linear)
    x = torch.randn(3, 5, 24)
    assert torch.equal(module(x), linear(x))  # starts as the published model
    nn.init.normal_(module.lora_b)
    merged = linear.weight + LOW_RANK_SCALE * module.lora_b @ module.lora_a
    torch.testing.assert_close(module(x), x @ merged.T)


def test_an_interrupted_training_resumes(tmp_path):
    recipe = Recipe()
    inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))

    def start():
        torch.manual_seed(1)
        module = nn.Linear(4, 2)
        return dict(module.named_parameters()), torch.optim.AdamW(module.parameters(), lr=0.1), module

    def steps(module, optimizer, count):
        for _ in range(count):
            optimizer.zero_grad()
            module(inputs).square().sum().backward()
            optimizer.step()

    whole, optimizer, module = start()
    steps(module, optimizer, 7)

    parameters, optimizer, module = start()
    steps(module, optimizer, 3)
    file = tmp_path / "bridge.safetensors.checkpoint"
    training._save(file, 3, recipe, parameters, optimizer)
    parameters, optimizer, module = start()
    assert training._restore(file, Recipe(seed=5), parameters, optimizer) == 0
    assert training._restore(file, recipe, parameters, optimizer) == 3
    steps(module, optimizer, 4)
    for name, tensor in whole.items():
        assert torch.equal(tensor, parameters[name])


def test_rate_warms_up_and_falls():
    recipe = Recipe()
    rates = [training._rate(step, recipe) for step in range(recipe.steps)]
    assert rates[recipe.warmup_steps - 1] == 1
    assert rates == [*sorted(rates[: recipe.warmup_steps]), *sorted(rates[recipe.warmup_steps :], reverse=True)]
    assert 0 < rates[-1] < 0.03


def test_empty_picture_has_only_unanswerable_or_text_only_questions(rows):
    seen = 0
    for step in range(0, 200, 5):
        for row in rows.at(step):
            if any(item.picture and item.picture.source == "empty" for item in row):
                assert all(item.answer == "unanswerable" for item in row if isinstance(item.picture, Picture))
                seen += 1
    assert seen
