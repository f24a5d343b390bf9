"""Prompt formats as texts and as tokens, recorded by hand from LLaVA's rule.

The rule: the text on each side of the image is tokenized alone, and <s> stands once at the beginning. In the tokenizer
of `original_llava` a word after a blank is one token if it is in `WORDS`, anything else is letters; sentencepiece puts
a blank (▁) before each text; a line break is a byte.
"""

import pytest
from jinja2 import Environment
from original_llava import WORDS, write_original_llava
from tiny_llava import random_image

from qvlm_plugin.conversation import Conversation, encode, render_answer
from qvlm_plugin.models.loading import load
from qvlm_plugin.models.prompts import PROMPT_FORMATS, PromptStyle, chat_template, name_of, origin_of, prompt_format

TURNS = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "it's?"}]},
    {"role": "assistant", "content": "red"},
    {"role": "user", "content": "is it?"},
]
SYSTEM = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
USER = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
HUMAN = USER.replace("user", "human")
TEXTS = {
    "vicuna_v1": USER + " USER: <image>\nit's? ASSISTANT: red</s>USER: is it? ASSISTANT:",
    "llava_v1": HUMAN + " USER: <image>\nit's? ASSISTANT: red</s>USER: is it? ASSISTANT:",
    "llava_v0": HUMAN + "###Human: <image>\nit's?###Assistant: red###Human: is it?###Assistant:",
    "stablelm": USER + " USER: <image>\nit's? ASSISTANT: red<|endoftext|>USER: is it? ASSISTANT:",
    "plain": "<image>\nit's?\nred\nis it?\n",
}


def rendered(template, messages):
    return Environment().from_string(template).render(messages=messages, add_generation_prompt=True)


@pytest.mark.parametrize("name", TEXTS)
def test_formats_are_written_as_llava_writes_them(name):
    prompt = prompt_format(name)
    assert rendered(chat_template(prompt), TURNS) == TEXTS[name]
    between = TEXTS[name].replace("<image>", "<im_start><image><im_end>")
    assert rendered(chat_template(prompt, PromptStyle(between=True)), TURNS) == between
    own = prompt.system + prompt.after_user if prompt.system else ""
    briefly = "Be brief." + prompt.after_user + TEXTS[name].removeprefix(own)
    assert rendered(chat_template(prompt), [SYSTEM, *TURNS]) == briefly


def test_images_in_the_text_are_written_without_a_line_break():
    content = [{"type": "text", "text": "is "}, {"type": "image", "inline": True}, {"type": "text", "text": " it?"}]
    written = rendered(chat_template(prompt_format("plain")), [{"role": "user", "content": content}])
    assert written == "is <image> it?\n"


def test_blanks_stand_before_each_text_beside_images():
    """As LLaVA tokenizes it: each text by itself, with the blank in front; and no text is none."""
    style, two = PromptStyle(blanks=True), [{"type": "image", "inline": True}] * 2
    messages = [*TURNS[:2], {"role": "user", "content": [*two, {"type": "text", "text": " it?"}]}]
    written = rendered(chat_template(prompt_format("vicuna_v1"), style), messages)
    assert written == f"▁{USER} USER: <image>▁\nit's? ASSISTANT: red</s>USER: <image><image>▁ it? ASSISTANT:"
    plain = chat_template(prompt_format("plain"), PromptStyle(between=True, blanks=True))
    assert rendered(plain, TURNS[:1]) == "▁<im_start><image>▁<im_end>\nit's?\n"
    assert rendered(chat_template(prompt_format("plain"), style), TURNS[:1]) == "<image>▁\nit's?\n"


def test_a_template_tells_its_format_and_style():
    for name, prompt in PROMPT_FORMATS.items():
        for style in (PromptStyle(), PromptStyle(between=True), PromptStyle(blanks=True), PromptStyle(True, True)):
            assert origin_of(chat_template(prompt, style)) == (name, style)
            assert name_of(chat_template(prompt, style)) == name
    assert origin_of("{{ messages }}") is None and name_of("{{ messages }}") is None


# Ids: 0 <unk>, 1 <s>, 2 </s>, 3 to 258 the bytes (a line break is byte 10: 13), 259 ▁, 260 on the letters from "!".
# Words are recorded as themselves.
OPENING = (
    "A chat between a curious {who} and an artificial intelligence assistant 273 "
    "The assistant gives helpful 271 detailed 271 and polite answers to the {who} 266 342 questions 273"
)
QUESTION = "259 13 314 331 324 343 is this 290"  # ▁ \n W h a t ▁is ▁this ?
RECORDED = {
    "vicuna_v1": f"1 {OPENING} USER 285 259 <image> {QUESTION} ASSISTANT 285".format(who="user"),
    "llava_v1": f"1 {OPENING} USER 285 259 <image> {QUESTION} ASSISTANT 285".format(who="human"),
    "llava_v0": (  # # # # H u m a n : ▁ … # # # A s s i s t a n t :
        f"1 {OPENING} 262 262 262 299 344 336 324 337 285 259 <image> {QUESTION} "
        "262 262 262 292 342 342 332 342 343 324 337 343 285"
    ).format(who="human"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_original_llava(tmp_path_factory.mktemp("prompts") / "llava")


@pytest.mark.parametrize("name", RECORDED)
def test_tokens_are_those_recorded(folder, name):
    loaded = load(str(folder), conv=name)
    tokenizer = loaded.processor.tokenizer
    inputs, _ = encode(loaded.processor, [Conversation.from_prompt("What is this?", [random_image(0)])])
    expected = []
    for token in RECORDED[name].split():
        if token == "<image>":
            expected += [loaded.model.config.image_token_id] * 4
        else:
            expected.append(tokenizer.convert_tokens_to_ids(f"▁{token}") if token in WORDS else int(token))
    assert inputs["input_ids"][0].tolist() == expected


def test_answers_continue_the_prompt_and_end_as_the_format_does(folder):
    conversation = Conversation.from_prompt("What is this?", [random_image(0)])
    for name, expected in {"llava_v1": " red</s>", "llava_v0": " red###", "plain": "red\n"}.items():
        loaded = load(str(folder), conv=name)
        answer = render_answer(loaded.processor, conversation, "red")
        assert answer == expected
        inputs, mask = encode(loaded.processor, [conversation], [answer])
        assert loaded.processor.tokenizer.decode(inputs["input_ids"][0][mask[0]]).strip() == expected.strip()
