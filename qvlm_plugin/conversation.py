"""Conversations with images, and how they become model inputs.

The one path from text and images to tensors: the harness wrapper, calibration and the demo all encode through here, so
what is calibrated is tokenized exactly as what is evaluated.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature, ProcessorMixin

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.images import as_rgb

IMAGE_PLACEHOLDER = "<image>"


@dataclass(frozen=True, eq=False)
class Conversation:
    """Chat messages and the images they show.

    Attributes:
        messages: ``{"role": …, "content": [{"type": "text", "text": …} | {"type": "image"}, …]}`` in order.
        images: one image per ``{"type": "image"}`` part, in order of appearance; kept as `as_rgb` makes them.

    Raises:
        ValueError: see `as_rgb`.
    """

    messages: tuple[Mapping[str, Any], ...]
    images: tuple[Image.Image, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "images", tuple(map(as_rgb, self.images)))

    @classmethod
    def from_prompt(cls, text: str, images: Sequence[Image.Image] = ()) -> "Conversation":
        """A single user turn.

        Images come first, unless the text places every one of them with ``<image>``.

        Raises:
            QVLMError: the text holds placeholders, but not one for each image.
        """
        pieces = text.split(IMAGE_PLACEHOLDER)
        if len(pieces) == 1:
            content: list[dict[str, str]] = [{"type": "image"} for _ in images]
            content.append({"type": "text", "text": text})
        elif len(pieces) - 1 == len(images):
            content = []
            for index, piece in enumerate(pieces):
                content += [{"type": "image"}] if index else []
                content += [{"type": "text", "text": piece.strip("\n")}] if piece.strip("\n") else []
        else:
            raise QVLMError(f"prompt has {len(pieces) - 1} {IMAGE_PLACEHOLDER} placeholders for {len(images)} images")
        return cls(({"role": "user", "content": content},), tuple(images))

    def digest(self) -> str:
        """SHA-256 over the words and pixels: equal for the same document, whichever way it was rendered."""
        sha = hashlib.sha256()
        for message in self.messages:
            for part in message["content"]:
                if part["type"] == "text":
                    sha.update(part["text"].strip().encode() + b"\0")
        _update_with_images(sha, self.images)
        return sha.hexdigest()

    def image_digest(self) -> str | None:
        """SHA-256 over the pixels alone: equal for questions about the same images; None without any."""
        if not self.images:
            return None
        sha = hashlib.sha256()
        _update_with_images(sha, self.images)
        return sha.hexdigest()


def _update_with_images(sha: "hashlib._Hash", images: Sequence[Image.Image]) -> None:
    for image in images:
        sha.update(repr(image.size).encode())
        sha.update(image.tobytes())


def render(processor: ProcessorMixin, conversation: Conversation) -> str:
    """The conversation as the model's chat template writes it, up to where the assistant's answer begins."""
    return processor.apply_chat_template(list(conversation.messages), add_generation_prompt=True, tokenize=False)


def render_answer(processor: ProcessorMixin, conversation: Conversation, answer: str) -> str:
    """What follows `render` when the assistant gives ``answer``, end-of-turn included.

    It ends with the end-of-sequence token where the template writes one: what a template puts behind it separates turns
    and is never generated.
    """
    turn = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    prompt = render(processor, conversation)
    full = processor.apply_chat_template([*conversation.messages, turn], tokenize=False)
    # Templates that open the assistant's turn differently when prompting still continue with the bare answer.
    if not full.startswith(prompt):
        return answer
    turn_text, end = full[len(prompt) :], processor.tokenizer.eos_token
    return turn_text[: turn_text.index(end) + len(end)] if end and end in turn_text else turn_text


def encode(
    processor: ProcessorMixin,
    conversations: Sequence[Conversation],
    continuations: Sequence[str] | None = None,
) -> tuple[BatchFeature, torch.Tensor]:
    """Tokenize a batch, padded on the left, with or without images in any of its conversations.

    Args:
        processor: the model's processor; it must have a chat template.
        conversations: B conversations.
        continuations: B texts to append after the prompts (answers, or continuations to score).

    Returns:
        The model inputs (``input_ids`` and ``attention_mask`` [B, T]; ``pixel_values`` when there is an image), and
        a bool mask [B, T] of the continuation's tokens (all false without continuations).

    Raises:
        QVLMError: a continuation adds no token.
    """
    tokenizer = processor.tokenizer
    prompts = [render(processor, conversation) for conversation in conversations]
    texts = [prompt + tail for prompt, tail in zip(prompts, continuations or [""] * len(prompts), strict=True)]
    # By conversation: LLaVA-OneVision crops an image only where it is the conversation's only one.
    images = [list(each.images) for each in conversations if each.images]
    # A template that writes the beginning-of-sequence token itself must not get a second one from the tokenizer.
    special = {"add_special_tokens": not (tokenizer.bos_token and prompts[0].startswith(tokenizer.bos_token))}
    inputs = processor(
        images=images or None, text=texts, padding=True, padding_side="left", return_tensors="pt", **special
    )
    mask = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    if continuations is not None:
        for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
            # Image placeholders expand alike in both, so the difference counts the continuation's tokens.
            added = len(tokenizer(text, **special).input_ids) - len(tokenizer(prompt, **special).input_ids)
            if added < 1:
                raise QVLMError(f"continuation {text[len(prompt) :]!r} adds no token to its prompt")
            mask[row, -added:] = True
    return inputs, mask


def to_device(inputs: BatchFeature, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Move a batch to ``device``, floating-point tensors (pixels) in the model's compute type ``dtype``."""
    return {
        name: tensor.to(device, dtype) if tensor.is_floating_point() else tensor.to(device)
        for name, tensor in inputs.items()
    }
