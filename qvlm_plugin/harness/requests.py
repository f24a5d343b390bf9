"""Convert the harness's request tuples to conversations.

lmms-eval has two request formats: "simple" (a text, and a function that returns the images) and "chat" (a function that
returns messages). Only this module knows their layout.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lmms_eval.api.instance import Instance
from PIL import Image

from qvlm_plugin.conversation import IMAGE_PLACEHOLDER, Conversation, message_content
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.images import as_rgb, is_deep, open_image

Documents = Mapping[str, Mapping[str, Any]]
"""``documents[task][split][doc_id]``, the harness's ``lm.task_dict``."""


@dataclass(frozen=True, eq=False)
class Request:
    """One question to the model.

    Attributes:
        task, doc_id: the document; doc_id is None for a text without a document.
        context: the prompt's text; requests are sorted by its length, and it is the response cache's key.
        build: builds the conversation; the document's images are decoded only then.
        generation: the task's generation arguments; None if a continuation is scored.
        continuation: the text whose likelihood is scored.
        is_padding: whether the request only gives all processes equally many requests; its answer is dropped.
        next_round: function of a multi-round task, which takes the round's index, the answers so far and the task's
            state, and returns the next round's conversation (None at the end), the answers to keep and the new state.
    """

    task: str
    doc_id: int | None
    context: str
    build: Callable[[], Conversation]
    generation: Mapping[str, Any] | None = None
    continuation: str | None = None
    is_padding: bool = False
    next_round: Callable[[int, list[str], Any], tuple[Conversation | None, list[str], Any]] | None = None

    @property
    def name(self) -> str:
        """The request's name in error messages."""
        return f"document {self.doc_id} of task {self.task}"

    def conversation(self) -> Conversation:
        """Build the conversation.

        Raises:
            QVLMError: the document cannot be read, or contains media other than images.
        """
        try:
            return self.build()
        except Exception as error:
            raise QVLMError(f"{self.name} cannot be prepared: {' '.join(str(error).split())}") from error

    def following(self, index: int, answers: list[str], state: object) -> tuple[Conversation | None, list[str], Any]:
        """The result of `next_round`; tasks without it have one round.

        Raises:
            QVLMError: the round cannot be prepared.
        """
        if self.next_round is None:
            return None, answers, state
        try:
            return self.next_round(index, answers, state)
        except Exception as error:
            raise QVLMError(
                f"{self.name}: round {index + 1} cannot be prepared: {' '.join(str(error).split())}"
            ) from error


def simple_generation(instance: Instance, documents: Documents) -> Request:
    """Convert a "simple" generation request (context, arguments, doc_to_visual, [doc_to_text,] doc_id, task, split)."""
    context, generation, doc_to_visual, *doc_to_text, doc_id, task, split = instance.args
    document = partial(_document, documents, task, split, doc_id)

    def next_round(index: int, answers: list[str], info: object) -> tuple[Conversation | None, list[str], Any]:
        step = doc_to_text[0](document(), previous_output=answers, round_idx=index, previous_round_info=info)
        visuals, text, finished, kept, info = step
        kept = answers if kept is None else list(kept)
        return (None if finished else from_visuals(text, visuals)), kept, info

    return Request(
        task=task,
        doc_id=doc_id,
        context=context,
        build=lambda: from_visuals(context, doc_to_visual(document())),
        generation=generation,
        is_padding=_is_padding(instance),
        next_round=next_round if doc_to_text else None,
    )


def chat_generation(instance: Instance, documents: Documents) -> Request:
    """Convert a "chat" generation request (context, doc_to_messages, arguments, doc_id, task, split)."""
    context, doc_to_messages, generation, doc_id, task, split = instance.args
    document = partial(_document, documents, task, split, doc_id)

    def next_round(index: int, answers: list[str], info: object) -> tuple[Conversation | None, list[str], Any]:
        step = doc_to_messages(document(), round_idx=index, previous_output=answers, previous_round_info=info)
        if not (isinstance(step, tuple) and len(step) == 4):  # a single-round task
            return None, answers, info
        messages, finished, kept, info = step
        kept = answers if kept is None else list(kept)
        return (None if finished else from_messages(messages)), kept, info

    return Request(
        task=task,
        doc_id=doc_id,
        context=context,
        build=lambda: from_messages(doc_to_messages(document())),
        generation=generation,
        is_padding=_is_padding(instance),
        next_round=next_round,
    )


def scoring(instance: Instance, documents: Documents) -> Request:
    """Convert a request for a likelihood: (context, continuation, doc_to_visual, doc_id, task, split).

    Only the "simple" format has them. (context, continuation), without a document, is for the likelihood of a text.
    """
    context, continuation, *rest = instance.args
    if not rest:
        return Request(
            task=instance.task_name,
            doc_id=None,
            context=context,
            build=lambda: Conversation.from_prompt(context),
            continuation=continuation,
            is_padding=_is_padding(instance),
        )
    doc_to_visual, doc_id, task, split = rest
    document = partial(_document, documents, task, split, doc_id)
    return Request(
        task=task,
        doc_id=doc_id,
        context=context,
        build=lambda: from_visuals(context, doc_to_visual(document())),
        continuation=str(continuation(document())) if callable(continuation) else continuation,
        is_padding=_is_padding(instance),
    )


def from_visuals(text: str, visuals: Iterable[object] | None) -> Conversation:
    """One user turn from a text and its images."""
    return Conversation.from_prompt(text, [_image(visual) for visual in visuals or ()])


def from_messages(messages: Sequence[Mapping[str, Any]]) -> Conversation:
    """A conversation from the harness's messages, whose content includes the images.

    If a message has one text with as many ``<image>`` placeholders as images, the images go there, as in the simple
    format; the harness itself always puts them first.
    """
    turns, images = [], []
    for message in messages:
        content = message["content"]
        parts = []
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part["type"] == "text":
                parts.append({"type": "text", "text": part["text"]})
            elif part["type"] == "image":
                parts.append({"type": "image"})
                images.append(_image(part["url"]))
            else:
                raise QVLMError(f"it contains {part['type']}; this model reads only text and images")
        match [part["text"] for part in parts if part["type"] == "text"]:
            case [text] if text.count(IMAGE_PLACEHOLDER) == len(parts) - 1:
                parts = message_content(text, len(parts) - 1)
        turns.append({"role": message["role"], "content": parts})
    return Conversation(tuple(turns), tuple(images))


def with_system_prompt(conversation: Conversation, text: str | None) -> Conversation:
    """The conversation, preceded by a system message unless its text is empty or None."""
    if not text:
        return conversation
    message = {"role": "system", "content": [{"type": "text", "text": text}]}
    return Conversation((message, *conversation.messages), conversation.images)


def _document(documents: Documents, task: str, split: str, doc_id: int) -> Any:
    return with_shallow_images(documents[task][split][doc_id])


def with_shallow_images(value: Any) -> Any:
    """A document whose images can be converted to RGB without clipping, see `as_rgb`."""
    if isinstance(value, dict):
        return {name: with_shallow_images(part) for name, part in value.items()}
    if isinstance(value, list):
        return [with_shallow_images(part) for part in value]
    return as_rgb(value) if isinstance(value, Image.Image) and is_deep(value) else value


def _is_padding(instance: Instance) -> bool:
    return bool(instance.metadata.get("__padding_only__"))


def _image(visual: object) -> Image.Image:
    if isinstance(visual, Image.Image):
        return visual
    if isinstance(visual, str | Path) and Path(visual).suffix.lower() in Image.registered_extensions():
        return open_image(Path(visual))
    if isinstance(visual, dict) and isinstance(visual.get("bytes"), bytes):  # undecoded, from ``datasets``
        return open_image(visual["bytes"])
    kind = visual.get("type", "a dict") if isinstance(visual, dict) else repr(visual)[:80]
    raise QVLMError(f"it contains {kind}; this model reads only text and images")
