"""Conversations with images, and how they become model inputs.

The one path from text and images to tensors: the harness wrapper, calibration and the demo all encode through here, so
what is calibrated is tokenized exactly as what is evaluated.
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
"""Code points that Unicode will never make characters, for programs' own use."""


@dataclass(frozen=True, eq=False)
class Conversation:
    """Chat messages and the images they show.

    Attributes:
        messages: ``{"role": …, "content": [{"type": "text", "text": …} | {"type": "image"}, …]}`` in order; `place`
            makes such contents.
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
        """A single user turn; where its images stand is what `place` says."""
        return cls(({"role": "user", "content": place(text, len(images))},), tuple(images))

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


def place(text: str, count: int) -> list[dict[str, Any]]:
    """The content of a message with ``count`` images.

    A text that holds ``<image>`` so many times places them; in any other number it mentions it, and means what it says.
    Images that are not placed come first, and so do those that the text places first, each with a line break. There
    they are parts ``{"type": "image"}``, which templates write in their own way, LLaVA's ``<image>`` and a line break.
    Everywhere else the text stays as it is, and the part is ``{"type": "image", "inline": True}``: the templates of
    `qvlm_plugin.models.prompts` write no line break then.
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
    """``text`` with a mark in each special token that it names, so that it stays text.

    What a document says is never a special token: only templates write those. `encode` takes the marks out where they
    cannot change that any more. A slow tokenizer has no such place, and its texts are left as they are.
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
    """The conversation as the model's chat template writes it, up to where the assistant's answer begins.

    Special tokens that its texts name are marked, see `as_text`.
    """
    return _written(processor, conversation.messages, add_generation_prompt=True)


def render_answer(processor: ProcessorMixin, conversation: Conversation, answer: str) -> str:
    """What follows `render` when the assistant gives ``answer``, end-of-turn included.

    It ends with the end-of-sequence token where the template writes one: what a template puts behind it separates turns
    and is never generated.
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
    """Tokenize a batch, padded on the left, with or without images in any of its conversations.

    Args:
        processor: the model's processor; it must have a chat template.
        conversations: B conversations.
        continuations: B texts to append after the prompts: from `render_answer`, or `as_text`.

    Returns:
        The model inputs (``input_ids`` and ``attention_mask`` [B, T]; ``pixel_values`` when there is an image), and
        a bool mask [B, T] of the continuation's tokens (all false without continuations).

    Raises:
        QVLMError: a continuation adds no token.
    """
    tokenizer = processor.tokenizer
    prompts = [render(processor, conversation) for conversation in conversations]
    texts = [prompt + tail for prompt, tail in zip(prompts, continuations or [""] * len(prompts), strict=True)]
    # By conversation: LLaVA-OneVision crops an image only where it is the conversation's only one, and Idefics3 counts
    # the images of each.
    images = [list(each.images) for each in conversations] if any(each.images for each in conversations) else None
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
                # Image placeholders expand alike in both, so the difference counts the continuation's tokens.
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
    """Let the tokenizer remove the marks of `as_text`.

    A fast tokenizer looks for special tokens before it normalizes what lies between them, and there the marks go. It
    looks for some in normalized text, before it splits that: there the others go, and split the text where they were.
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
    """Move a batch to ``device``, floating-point tensors (pixels) in the model's compute type ``dtype``."""
    return {
        name: tensor.to(device, dtype) if tensor.is_floating_point() else tensor.to(device)
        for name, tensor in inputs.items()
    }
