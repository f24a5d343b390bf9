"""Dialogues become the tokens that LLaVA's own code made of them; `record_llava_tokens` recorded those."""

import gzip
import json

import pytest
from original_llava import write_original_llava
from PIL import Image
from record_llava_tokens import ADDED, MORE_PIECES, RECORDING, SETTINGS

from qvlm_plugin.conversation import Conversation, encode
from qvlm_plugin.harness.requests import from_messages
from qvlm_plugin.models.loading import load
from qvlm_plugin.models.prompts import chat_template, origin_of, prompt_format

DIALOGUES = [json.loads(line) for line in gzip.decompress(RECORDING.read_bytes()).decode().split("\n")]
PATCHES = 4
PICTURE = Image.new("RGB", (28, 28))


@pytest.fixture(scope="module", params=range(len(SETTINGS)), ids=[f"legacy={a},between={b}" for a, b in SETTINGS])
def recorded(request, tmp_path_factory):
    """A processor, the id that stands for an image, and each dialogue with its ids."""
    legacy, between = SETTINGS[request.param]
    folder = tmp_path_factory.mktemp("recorded")
    write_original_llava(folder, between=between, legacy=legacy, more_pieces=MORE_PIECES, added_tokens=ADDED)
    loaded = load(str(folder), dtype="float32")
    cases = [(conv, turns, ids[request.param]) for conv, turns, ids in DIALOGUES]
    return loaded.processor, loaded.model.config.image_token_id, cases


def test_there_are_enough_dialogues_of_every_kind():
    assert len(DIALOGUES) >= 500 and {conv for conv, _, _ in DIALOGUES} == {
        "vicuna_v1",
        "llava_v1",
        "llava_v0",
        "plain",
    }
    assert sum(len(turns) > 1 for _, turns, _ in DIALOGUES) > 150
    assert sum("<image>" in turns[0][0] for _, turns, _ in DIALOGUES) > 200


def test_tokens_are_those_of_llavas_own_code(recorded):
    processor, image_token, cases = recorded
    style = origin_of(processor.chat_template)[1]
    templates = {conv: chat_template(prompt_format(conv), style) for conv, _, _ in cases}
    for conv, turns, expected in cases:
        processor.chat_template = templates[conv]
        inputs, _ = encode(processor, [conversation_of(turns)])
        expanded = [id_ for one in expected for id_ in ([image_token] * PATCHES if one == -200 else [one])]
        assert inputs["input_ids"][0].tolist() == expanded, (conv, turns)


def conversation_of(turns):
    """As the harness's simple format gives it, and just so its chat format, which puts all images in front."""
    messages, images = [], []
    for turn in turns:
        if isinstance(turn, str):
            messages.append({"role": "assistant", "content": [{"type": "text", "text": turn}]})
            continue
        text, count = turn
        images += [PICTURE] * count
        content = [*[{"type": "image", "url": PICTURE}] * count, {"type": "text", "text": text}]
        (simple,) = Conversation.from_prompt(text, [PICTURE] * count).messages
        (chat,) = from_messages([{"role": "user", "content": content}]).messages
        assert simple == chat
        messages.append(simple)
    return Conversation(tuple(messages), tuple(images))
