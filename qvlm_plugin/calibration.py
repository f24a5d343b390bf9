"""Calibration sets: the image-text-answer triples to which quantization parameters are fitted.

The paper draws 64 vision-language pairs at random (section 4.1). They come from a task's training split (see
`qvlm_plugin.harness`), from a file in LLaVA's conversation format, or from memory. They must not be documents that are
evaluated: an evaluation compares the content digests of both.
"""

import hashlib
import json
import random
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import BatchFeature, ProcessorMixin

from qvlm_plugin.conversation import IMAGE_PLACEHOLDER, Conversation, encode, render_answer
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.images import open_image
from qvlm_plugin.reading import concerning, inside, parse_json_lines, read_json

IMAGE_KEY = "image"
"""Key of a row in LLaVA's conversation format; its value is the name of the row's image, or a list of names."""

DEFAULT_COUNT = 64
"""Number of samples to draw if a source gives none (paper, section 4.1)."""

KEPT_BYTES = 2**28
"""Bytes of an encoded calibration set kept in memory: 198 samples of one image of 336 x 336 pixels (64: 87 MB)."""

Encoded = tuple[BatchFeature, torch.Tensor]
"""A batch: model inputs, and the bool mask [B, T] of the answers' tokens."""


@dataclass(frozen=True, eq=False)
class Sample:
    """One image-text-answer triple."""

    conversation: Conversation
    answer: str


@dataclass(frozen=True, eq=False)
class CalibrationSet:
    """Samples and their source.

    Attributes:
        samples: the samples, in the order drawn.
        source: the source, as the user gave it.
        seed: seed of the draw.

    Raises:
        QVLMError: there are no samples, or none has an image.
    """

    samples: tuple[Sample, ...]
    source: str = "memory"
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.samples:
            raise QVLMError(f"calibration={self.source!r} is empty; it needs at least one image-text-answer triple")
        if not any(sample.conversation.images for sample in self.samples):
            raise QVLMError(
                f"calibration={self.source!r} has no image; a vision-language model needs some to calibrate"
            )

    def digests(self) -> tuple[str, ...]:
        """The content digest of each sample's document (`Conversation.digest`)."""
        return tuple(sample.conversation.digest() for sample in self.samples)

    def without(self, digests: Collection[str]) -> tuple[Sample, ...]:
        """The samples whose documents have none of these digests."""
        pairs = zip(self.samples, self.digests(), strict=True)
        return tuple(sample for sample, digest in pairs if digest not in digests)

    def content_hash(self) -> str:
        """SHA-256 over documents and answers, in order."""
        pairs = zip(self.digests(), (sample.answer for sample in self.samples), strict=True)
        return hashlib.sha256(json.dumps(list(pairs)).encode()).hexdigest()

    def batches(self, processor: ProcessorMixin, batch_size: int) -> Iterator[Encoded]:
        """Model inputs with answers, left-padded, and the bool mask [B, T] of the answers' tokens."""
        return self._encode(processor, batch_size, 0)

    def encoded(self, processor: ProcessorMixin, batch_size: int) -> "EncodedSet":
        """The samples, encoded once for a search, which reads the same batches several times."""
        return EncodedSet(self.samples, self.source, self.seed, processor=processor, batch_size=batch_size)

    def _encode(self, processor: ProcessorMixin, batch_size: int, start: int) -> Iterator[Encoded]:
        for first in range(start, len(self.samples), batch_size):
            batch = self.samples[first : first + batch_size]
            conversations = [sample.conversation for sample in batch]
            answers = [render_answer(processor, sample.conversation, sample.answer) for sample in batch]
            yield encode(processor, conversations, answers)


@dataclass(frozen=True, eq=False)
class EncodedSet(CalibrationSet):
    """A calibration set, encoded on creation by one processor; the first batches are kept, up to `KEPT_BYTES`.

    Callers must not change the tensors of a batch in place.

    Attributes:
        processor, batch_size: processor and batch size of the encoding; with any others, `batches` encodes again.
        kept: the first batches.
        lengths: number of tokens of each sample, including those of images and answer.
    """

    processor: ProcessorMixin = field(kw_only=True)
    batch_size: int = field(kw_only=True)
    kept: tuple[Encoded, ...] = field(init=False)  # computed again when `replace` changes the samples
    lengths: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        kept, lengths, free = [], [], KEPT_BYTES
        for inputs, answer in self._encode(self.processor, self.batch_size, 0):
            lengths += inputs["attention_mask"].sum(dim=1).tolist()
            free -= sum(tensor.nbytes for tensor in inputs.values()) + answer.nbytes
            if free >= 0:
                kept.append((inputs, answer))
        object.__setattr__(self, "kept", tuple(kept))
        object.__setattr__(self, "lengths", tuple(lengths))

    def batches(self, processor: ProcessorMixin, batch_size: int) -> Iterator[Encoded]:
        """See `CalibrationSet.batches`."""
        kept = self.kept if processor is self.processor and batch_size == self.batch_size else ()
        for inputs, answer in kept:
            yield BatchFeature(dict(inputs)), answer
        yield from self._encode(processor, batch_size, len(kept) * batch_size)


@dataclass(frozen=True)
class Source:
    """One term of ``calibration=``: a task's split or a conversation file, and how many samples to draw from it.

    Attributes:
        location: a task name, or the path of a ``.json`` or ``.jsonl`` file.
        split: the task's split; None for a file.
        count: samples to draw.
    """

    location: str
    split: str | None
    count: int


def parse_sources(text: str) -> tuple[Source, ...]:
    """Read ``task:split[:n]`` and ``file.json[:n]``, several of them joined by ``+``.

    Raises:
        QVLMError: a term is neither.
    """
    return tuple(_parse_source(term, text) for term in str(text).split("+"))


def check_sources(text: str) -> None:
    """Check sources as far as possible without reading tasks and rows.

    Raises:
        QVLMError: a source does not parse, or its file does not exist.
    """
    for source in parse_sources(text):
        if source.split is None:
            _require_file(Path(source.location))


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise QVLMError(f"calibration={str(path)!r}: there is no such file")


def _parse_source(term: str, text: str) -> Source:
    location, *rest = term.split(":")
    count = DEFAULT_COUNT
    if rest and re.fullmatch("[0-9]{1,9}", rest[-1]):
        count = int(rest.pop())
    is_file = location.endswith((".json", ".jsonl"))
    if not location or len(rest) != (0 if is_file else 1) or count < 1 or (rest and not rest[0]):
        raise QVLMError(
            f"calibration={text!r}: {term!r} is neither task:split:n (for example scienceqa:train:64) nor file.json:n; "
            "join several with +"
        )
    return Source(location, rest[0] if rest else None, count)


def read_calibration(
    text: str,
    image_folder: Path | None,
    seed: int,
    draw_from_task: Callable[[str, str, int, int], list[Sample]],
) -> CalibrationSet:
    """The calibration set of ``calibration=``.

    Args:
        text: sources, see `parse_sources`.
        image_folder: the folder of the images of conversation files; None means each file's own folder.
        seed: seed of the draws.
        draw_from_task: (task, split, count, seed) → samples; reads the task definitions of an evaluation harness.

    Raises:
        QVLMError: a source does not parse, does not exist, or has too few usable samples.
    """
    samples: list[Sample] = []
    for source in parse_sources(text):
        if source.split is None:
            samples += read_conversations(Path(source.location), image_folder, source.count, seed)
        else:
            samples += draw_from_task(source.location, source.split, source.count, seed)
    return CalibrationSet(tuple(samples), str(text), seed)


def read_conversations(path: Path, image_folder: Path | None, count: int, seed: int) -> list[Sample]:
    """Draw samples from a file in LLaVA's conversation format.

    The file is a JSON list, or JSON lines, of objects ``{"image": "file.png", "conversations": [{"from": "human",
    "value": "<image>\\nWhat is shown?"}, {"from": "gpt", "value": "A cat"}, …]}``. Only rows with an image are drawn.
    A row's sample is its first question with an ``<image>`` placeholder and the images of its placeholders; if no
    question has one, its first question and all images.

    Args:
        path: the file.
        image_folder: the folder of the images; None means the file's own folder.
        count: number of samples to draw; fewer rows are an error.
        seed: seed of the draw.

    Raises:
        QVLMError: the file or an image is missing or unreadable, or the file has too few rows with images.
    """
    _require_file(path)
    all_rows = _read_rows(path)
    rows = [row for row in all_rows if row.get(IMAGE_KEY)]
    if len(rows) < count:
        keys = ", ".join(sorted({str(key) for row in all_rows for key in row}))[:200] or "none"
        raise QVLMError(
            f"calibration={str(path)!r} has {len(rows)} rows with an image under the key {IMAGE_KEY!r}, but needs "
            f"{count}; the keys of its {len(all_rows)} rows are {keys}"
        )
    folder = image_folder or path.parent
    return [_sample(row, folder, path) for row in draw(rows, count, seed)]


def draw(items: Sequence[Any], count: int, seed: int) -> list[Any]:
    """``count`` random items in their original order; the same for the same seed."""
    return [items[index] for index in sorted(random.Random(seed).sample(range(len(items)), count))]


def _read_rows(path: Path) -> list[dict[str, Any]]:
    try:
        rows = read_json(path) if path.suffix == ".json" else parse_json_lines(path.read_bytes())
    except (OSError, ValueError) as error:
        raise QVLMError(f"calibration={str(path)!r} is not readable JSON: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise QVLMError(f"calibration={str(path)!r} must hold a list of objects in LLaVA's conversation format")
    return rows


def _sample(row: dict[str, Any], folder: Path, path: Path) -> Sample:
    source = f"calibration={str(path)!r}: row {row.get('id')!r:.100}"
    with concerning(source):
        turns = row["conversations"] if isinstance(row.get("conversations"), list) else []
        placed = [_placeholders(turn) for turn in turns]
        first = next((index for index, count in enumerate(placed) if count), 0)
        try:
            question, answer = (turn["value"] for turn in turns[first : first + 2])
            speakers = [turn["from"] for turn in turns[first : first + 2]]
        except (KeyError, TypeError, ValueError) as error:
            raise QVLMError(f"{source} has no question and answer") from error
        if speakers != ["human", "gpt"]:
            raise QVLMError(f"{source} does not begin with human, then gpt")
        if not isinstance(question, str) or not isinstance(answer, str):
            raise QVLMError(f"{source} has a question or an answer that is not text")
        names = row[IMAGE_KEY] if isinstance(row[IMAGE_KEY], list) else [row[IMAGE_KEY]]
        if sum(placed) == len(names):  # the other images belong to later questions
            names = names[: placed[first]]
        images = [open_image(inside(folder, name, source)) for name in names]
        return Sample(Conversation.from_prompt(_placed(question, len(images), source), images), answer)


def _placed(question: str, count: int, source: str) -> str:
    """The question of a row, in which a single image is moved to the front.

    LLaVA does this when it trains (``preprocess_multimodal`` in llava/train/train.py) and evaluates ScienceQA
    (llava/eval/model_vqa_science.py), and so do Q-VLM's authors in calibration, as ScienceQA's rows end in the image.
    Several images stay where the question places them.
    """
    if count == 1:
        return f"{IMAGE_PLACEHOLDER}\n{question.replace(IMAGE_PLACEHOLDER, '').strip()}"
    if (placed := question.count(IMAGE_PLACEHOLDER)) not in (0, count):
        raise QVLMError(f"{source} places {placed} of its {count} images with {IMAGE_PLACEHOLDER}; place all, or none")
    return question


def _placeholders(turn: Any) -> int:
    """The number of image placeholders in a turn; 0 for an answer, whose text may mention them."""
    text = turn.get("value") if isinstance(turn, dict) and turn.get("from") == "human" else None
    return text.count(IMAGE_PLACEHOLDER) if isinstance(text, str) else 0
