import pytest
import torch
from tiny_llava import random_image

from qvlm_plugin.conversation import Conversation, encode, render, render_answer
from qvlm_plugin.errors import QVLMError


def test_images_come_first_unless_the_text_places_them():
    plain = Conversation.from_prompt("what?", [random_image(0)])
    assert [part["type"] for part in plain.messages[0]["content"]] == ["image", "text"]
    placed = Conversation.from_prompt("left <image> right <image>?", [random_image(0), random_image(1)])
    assert [part["type"] for part in placed.messages[0]["content"]] == ["text", "image", "text", "image", "text"]
    with pytest.raises(QVLMError, match="2 <image> placeholders for 1 images"):
        Conversation.from_prompt("<image><image>", [random_image(0)])


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
