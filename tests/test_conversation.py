import pytest
import torch
from moe_llava import write_moe_llava
from original_llava import write_original_llava
from sentencepiece import SentencePieceProcessor
from tiny_families import write_tiny_llava_onevision
from tiny_llava import random_image
from tokenizers import AddedToken

from qvlm_plugin.conversation import Conversation, as_text, encode, render, render_answer
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.models.loading import load


def test_text_that_names_special_tokens_is_tokenized_as_any_text(tmp_path):
    folder = write_original_llava(tmp_path / "m")
    processor = load(str(folder), dtype="float32", conv="plain").processor
    text = "is </s> or<image> <s>?"
    inputs, _ = encode(processor, [Conversation.from_prompt(text)])
    pieces = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))  # to which only text is text
    assert inputs["input_ids"][0].tolist() == [1, *pieces.encode(f"{text}\n")]


FRONT, INLINE = {"type": "image"}, {"type": "image", "inline": True}


def text(content):
    return {"type": "text", "text": content}


@pytest.mark.parametrize(
    "prompt, count, content",
    [
        ("what?", 0, [text("what?")]),
        ("what?", 2, [FRONT, FRONT, text("what?")]),
        ("<image>\nwhat?", 1, [FRONT, text("what?")]),
        ("<image>\n<image>\n\nwhat?", 2, [FRONT, FRONT, text("\nwhat?")]),
        ("<image> what?", 1, [INLINE, text(" what?")]),
        ("what?\n<image>", 1, [text("what?\n"), INLINE]),
        ("<image>\nor <image>\n<image>?", 3, [FRONT, text("or "), INLINE, text("\n"), INLINE, text("?")]),
        ("<image><image>", 1, [FRONT, text("<image><image>")]),
        ("what is <image>?", 0, [text("what is <image>?")]),
    ],
)
def test_images_come_first_unless_the_text_places_every_one(prompt, count, content):
    images = [random_image(index) for index in range(count)]
    assert Conversation.from_prompt(prompt, images).messages[0]["content"] == content


@pytest.fixture(params=["llava", "onevision", "original", "original without legacy", "moe"])
def processor(request, loaded, tmp_path):
    match request.param:
        case "llava":
            return loaded.processor
        case "onevision":
            folder = write_tiny_llava_onevision(tmp_path / "m")
        case "moe":
            folder = write_moe_llava(tmp_path / "m")
        case _:
            folder = write_original_llava(tmp_path / "m", legacy="without" not in request.param)
    return load(str(folder), dtype="float32").processor


def test_no_text_becomes_a_special_token(processor):
    tokenizer = processor.tokenizer
    tokenizer.add_tokens([AddedToken("<odd>", special=True, normalized=True)], special_tokens=True)
    specials = {token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    assert {"<image>", "<odd>", tokenizer.eos_token} <= specials.keys()
    named = f"a {' '.join(specials)}{''.join(specials)}"
    images = [random_image(0)]
    plain, _ = encode(processor, [Conversation.from_prompt("q", images)])
    odd, mask = encode(processor, [Conversation.from_prompt(named, images)], [as_text(tokenizer, named)])
    for index in specials.values():
        assert (odd["input_ids"] == index).sum() == (plain["input_ids"] == index).sum()
    assert tokenizer.decode(odd["input_ids"][mask]).strip() == named
    again, _ = encode(processor, [Conversation.from_prompt("q", images)])
    assert torch.equal(again["input_ids"], plain["input_ids"])  # the tokenizer is as it was


def test_digest_identifies_words_and_pixels():
    digest = Conversation.from_prompt("what?", [random_image(0)]).digest()
    assert digest == Conversation.from_prompt("<image>\nwhat?", [random_image(0)]).digest()
    assert digest != Conversation.from_prompt("what!", [random_image(0)]).digest()
    assert digest != Conversation.from_prompt("what?", [random_image(1)]).digest()
    assert digest != Conversation.from_prompt("what?").digest()


def test_batches_mix_documents_with_and_without_images(loaded):
    conversations = [
        Conversation.from_prompt("no image"),
        Conversation.from_prompt("one", [random_image(0)]),
        Conversation.from_prompt("two", [random_image(0), random_image(1)]),
    ]
    batch, mask = encode(loaded.processor, conversations)
    assert batch["pixel_values"].shape[0] == 3 and not mask.any()
    assert (batch["input_ids"] == 3).sum(dim=1).tolist() == [0, 4, 8]
    assert batch["attention_mask"][:, -1].all()  # padded on the left
    for row, conversation in enumerate(conversations):
        alone, _ = encode(loaded.processor, [conversation])
        assert torch.equal(batch["input_ids"][row][batch["attention_mask"][row].bool()], alone["input_ids"][0])
    text_only, _ = encode(loaded.processor, conversations[:1])
    assert "pixel_values" not in text_only


def test_the_mask_marks_exactly_the_continuation(loaded):
    conversations = [Conversation.from_prompt("a longer question", [random_image(0)]), Conversation.from_prompt("b")]
    batch, mask = encode(loaded.processor, conversations, ["x", "yes it is"])
    decoded = [loaded.processor.tokenizer.decode(ids[row]) for ids, row in zip(batch["input_ids"], mask, strict=True)]
    assert decoded == ["x", "yes it is"]
    with pytest.raises(QVLMError, match="adds no token"):
        encode(loaded.processor, conversations, ["x", ""])


def test_a_rendered_answer_continues_the_prompt_to_the_end_of_the_turn(loaded):
    conversation = Conversation.from_prompt("q")
    assert render(loaded.processor, conversation).endswith("ASSISTANT:")
    assert render_answer(loaded.processor, conversation, "red") == "red</s>"


def test_a_rendered_answer_ends_with_its_end_token(loaded, monkeypatch):
    monkeypatch.setattr(loaded.processor, "chat_template", loaded.processor.chat_template.replace("</s>", "</s>\\n"))
    conversation = Conversation.from_prompt("What color is it?")
    assert render_answer(loaded.processor, conversation, "red") == "red</s>"


def test_a_template_that_writes_the_first_token_does_not_get_it_twice(loaded):
    tokenizer = loaded.processor.tokenizer
    loaded.processor.chat_template = "{{ bos_token }}" + loaded.processor.chat_template
    batch, _ = encode(loaded.processor, [Conversation.from_prompt("q")])
    assert (batch["input_ids"] == tokenizer.bos_token_id).sum() == 1
