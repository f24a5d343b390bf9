"""What tests of families do with any of them."""

import copy
from dataclasses import replace

import torch
from tiny_llava import random_image

from qvlm_plugin import planning, plugins
from qvlm_plugin.conversation import Conversation, encode, to_device
from qvlm_plugin.models.decoding import positions
from qvlm_plugin.models.loading import load

SHAPES = [(50, 30), (28, 60), (40, 40)]


def picture(seed):
    """Images of several shapes: families that crop, or keep an image's own size, make different numbers of tokens."""
    return random_image(seed, 32).resize(SHAPES[seed % 3])


CONVERSATIONS = [
    Conversation.from_prompt("no image"),
    Conversation.from_prompt("What is this?", [picture(0)]),
    Conversation.from_prompt("two of them?", [picture(1), picture(2)]),
]


def load_family(write, directory):
    """The family of a writer of checkpoints."""
    return load(str(write(directory / "model")), dtype="float32", check_config=plugins.topology)


def quantized(loaded, plan, backend="reference"):
    """The model quantized by the plan; ``loaded`` itself stays as it is."""
    twin = replace(loaded, model=copy.deepcopy(loaded.model))
    planning.apply(plan, twin, backend)
    return twin


@torch.inference_mode()
def answers(loaded):
    """Two tokens for each of the conversations."""
    inputs, _ = encode(loaded.processor, CONVERSATIONS)
    placed = to_device(inputs, torch.device("cpu"), loaded.model.dtype)
    return loaded.model.generate(**placed, max_new_tokens=2, do_sample=False)[:, inputs["input_ids"].shape[1] :]


@torch.inference_mode()
def check_batches(loaded):
    """A batch of conversations answers as each of them alone."""
    batch, _ = encode(loaded.processor, CONVERSATIONS)
    together = loaded.model(**batch, position_ids=positions(loaded.model, batch)).logits
    for row, conversation in enumerate(CONVERSATIONS):
        alone, _ = encode(loaded.processor, [conversation])
        kept = batch["attention_mask"][row].bool()
        assert torch.equal(batch["input_ids"][row][kept], alone["input_ids"][0])
        expected = loaded.model(**alone, position_ids=positions(loaded.model, alone)).logits[0]
        assert torch.allclose(together[row][kept], expected, atol=1e-4)
