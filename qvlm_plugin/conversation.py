"""Conversations with images, and how they become model inputs.

The harness wrapper, calibration and the demo all encode through this module, so calibration samples are tokenized
exactly as evaluated documents are.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from tokenizers import normalizers, pre_tokenizers
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.images import as_rgb

IMAGE_PLACEHOLDER = "<image>"
_MARK, _LATE_MARK = "\ufdd0", "\ufdd1"
"""Noncharacters: code points that Unicode reserves for internal use and never assigns."""


@dataclass(frozen=True, eq=False)
class Conversation:
    """Chat messages and the images they show.

    Attributes:
        messages: ``{"role": …, "content": [{"type": "text", "text": …} | {"type": "image"}, …]}`` in order; see
            `message_content`.
        images: one image per ``{"type": "image"}`` part, in order of appearance, converted by `as_rgb`.

    Raises:
        ValueError: see `as_rgb`.
    """

    messages: tuple[Mapping[str, Any], ...]
    images: tuple[Image.Image, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "images", tuple(map(as_rgb, self.images)))

    @classmethod
    def from_prompt(cls, text: str, images: Sequence[Image.Image] = ()) -> "Conversation":
        """A single user turn; `message_content` decides where its images stand."""
        return cls(({"role": "user", "content": message_content(text, len(images))},), tuple(images))

    def digest(self) -> str:
        """SHA-256 over text and pixels: equal for the same document, however its prompt is rendered."""
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


def message_content(text: str, count: int) -> list[dict[str, Any]]:
    """The content of a message with ``count`` images.

    If the text contains ``<image>`` exactly ``count`` times, these placeholders give the positions of the images;
    any other number of them is ordinary text, and all images come first. Images at the front (also those that the text
    itself places there, each followed by a line break) are parts ``{"type": "image"}``, which every chat template
    renders in its own way; LLaVA's writes ``<image>`` and a line break. Images further on are parts ``{"type": "image",
    "inline": True}``, for which the templates of `qvlm_plugin.models.prompts` write no line break.
    """
    front, inline = {"type": "image"}, {"type": "image", "inline": True}
    if text.count(IMAGE_PLACEHOLDER) != count:
        return [front] * count + [{"type": "text", "text": text}]
    content: list[dict[str, Any]] = []
    while text.startswith(f"{IMAGE_PLACEHOLDER}\n"):
        content.append(front)
        text = text.removeprefix(f"{IMAGE_PLACEHOLDER}\n")
    for index, piece in enumerate(text.split(IMAGE_PLACEHOLDER)):
        content += [inline] if index else []
        content += [{"type": "text", "text": piece}] if piece else []
    return content


def as_text(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """``text`` with a mark inside each special token that it spells out, so that the tokenizer reads it as text.

    Only chat templates may write special tokens, documents may not. `encode` has the marks removed after the tokenizer
    has looked for special tokens. A slow tokenizer offers no such step: its texts are returned unchanged.
    """
    if not tokenizer.is_fast:
        return text
    text = text.replace(_MARK, "").replace(_LATE_MARK, "")
    for token in tokenizer.added_tokens_decoder.values():
        if token.special and token.content in text:
            mark = _LATE_MARK if token.normalized else _MARK
            text = text.replace(token.content, f"{token.content[0]}{mark}{token.content[1:]}")
    return text


def _update_with_images(sha: "hashlib._Hash", images: Sequence[Image.Image]) -> None:
    for image in images:
        sha.update(repr(image.size).encode())
        sha.update(image.tobytes())


def render(processor: ProcessorMixin, conversation: Conversation) -> str:
    """The conversation in the model's chat template, up to where the assistant's answer begins.

    Special tokens that its texts spell out are marked, see `as_text`.
    """
    return _written(processor, conversation.messages, add_generation_prompt=True)


def render_answer(processor: ProcessorMixin, conversation: Conversation, answer: str) -> str:
    """The text that follows `render` when the assistant gives ``answer``, end of turn included.

    It ends with the end-of-sequence token if the template writes one: the template's text after that token separates
    turns, and a model never generates it.
    """
    turn = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    prompt = render(processor, conversation)
    full = _written(processor, (*conversation.messages, turn))
    # Templates that open the assistant's turn differently when prompting still continue with the bare answer.
    if not full.startswith(prompt):
        return as_text(processor.tokenizer, answer)
    turn_text, end = full[len(prompt) :], processor.tokenizer.eos_token
    return turn_text[: turn_text.index(end) + len(end)] if end and end in turn_text else turn_text


def _written(processor: ProcessorMixin, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
    marked = [
        {
            **message,
            "content": [
                {**part, "text": as_text(processor.tokenizer, part["text"])} if part["type"] == "text" else part
                for part in message["content"]
            ],
        }
        for message in messages
    ]
    return processor.apply_chat_template(marked, tokenize=False, **options)


def encode(
    processor: ProcessorMixin,
    conversations: Sequence[Conversation],
    continuations: Sequence[str] | None = None,
) -> tuple[BatchFeature, torch.Tensor]:
    """Tokenize a batch, padded on the left; any of its conversations may have images.

    Args:
        processor: the model's processor; it must have a chat template.
        conversations: B conversations.
        continuations: B texts to append after the prompts: from `render_answer`, or `as_text`.

    Returns:
        The model inputs (``input_ids`` and ``attention_mask`` [B, T]; ``pixel_values`` when there is an image), and
        a bool mask [B, T] of the continuations' tokens (all false without continuations).

    Raises:
        QVLMError: a continuation adds no token.
    """
    tokenizer = processor.tokenizer
    prompts = [render(processor, conversation) for conversation in conversations]
    texts = [prompt + tail for prompt, tail in zip(prompts, continuations or [""] * len(prompts), strict=True)]
    # One list for each conversation: LLaVA-OneVision crops an image only if its conversation has no other, and Idefics3
    # counts the images of each conversation.
    images = [list(one.images) for one in conversations] if any(one.images for one in conversations) else None
    # A template that writes the beginning-of-sequence token itself must not get a second one from the tokenizer.
    special = {"add_special_tokens": not (tokenizer.bos_token and prompts[0].startswith(tokenizer.bos_token))}
    with _marks_removed(processor.tokenizer, texts):
        inputs = processor(
            images=images,
            text=texts,
            padding=True,
            padding_side="left",
            return_tensors="pt",
            **special,
        )
        mask = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
        if continuations is not None:
            for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
                # Image placeholders expand equally in both, so the difference is the number of continuation tokens.
                added = len(tokenizer(text, **special).input_ids) - len(tokenizer(prompt, **special).input_ids)
                if added < 1:
                    raise QVLMError(f"continuation {text[len(prompt) :]!r} adds no token to its prompt")
                mask[row, -added:] = True
    kind = getattr(processor, "answer_token_type", None)
    if kind is not None:
        inputs["token_type_ids"][mask] = kind
    return inputs, mask


@contextmanager
def _marks_removed(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Iterator[None]:
    """Within this context the tokenizer removes the marks of `as_text`.

    A fast tokenizer finds most special tokens in the raw text and then normalizes the text between them: the normalizer
    removes ``_MARK``. It finds tokens with ``normalized=True`` in the normalized text, which it then splits into words:
    the pre-tokenizer removes ``_LATE_MARK``, and splits the text there.
    """
    if not any(_MARK in text or _LATE_MARK in text for text in texts):
        yield
        return
    backend = tokenizer.backend_tokenizer
    normalizer, splitter = backend.normalizer, backend.pre_tokenizer
    remove, split = normalizers.Replace(_MARK, ""), pre_tokenizers.Split(_LATE_MARK, "removed")
    backend.normalizer = remove if normalizer is None else normalizers.Sequence([remove, normalizer])
    backend.pre_tokenizer = split if splitter is None else pre_tokenizers.Sequence([split, splitter])
    try:
        yield
    finally:
        backend.normalizer, backend.pre_tokenizer = normalizer, splitter


def to_device(inputs: BatchFeature, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Move a batch to ``device``; floating-point tensors (pixels) are cast to the model's compute type ``dtype``."""
    return {
        name: tensor.to(device, dtype) if tensor.is_floating_point() else tensor.to(device)
        for name, tensor in inputs.items()
    }
