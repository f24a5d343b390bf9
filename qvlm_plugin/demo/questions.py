"""easy-VQA's questions as documents in the three benchmarks' schemas, with the prompts that the harness makes of them.

The mirrors (`data`) write these documents and training (`train`) reads them, so that the model is trained on the
prompts of the evaluation. A document is a dict with the hub data set's columns, except that `image` is a `Picture`
instead of pixels.

Each easy-VQA image shows one shape of one colour on a light background; documents are drawn accordingly.
"""

import functools
import hashlib
import io
import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
from PIL import Image

from qvlm_plugin.demo import parts

COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
UNANSWERABLE = "unanswerable"
Document = dict[str, Any]


@dataclass(frozen=True)
class Picture:
    """An image by name: easy-VQA's image `number` of `source` train or test, or this package's empty image `number`."""

    source: str
    number: int


@dataclass(frozen=True)
class Question:
    """An official easy-VQA question and its answer; `fact` is the picture's content ("red circle"), if known."""

    text: str
    answer: str
    picture: Picture
    fact: str | None

    @property
    def open(self) -> bool:
        """Whether it asks for a colour or a shape instead of yes or no."""
        return self.answer not in ("yes", "no")


@dataclass(frozen=True)
class Pool:
    """Questions to draw from, by kind: three of four in easy-VQA are yes-or-no questions, too many for a benchmark."""

    open: Sequence[Question]
    closed: Sequence[Question]

    @classmethod
    def of(cls, questions: Iterable[Question]) -> "Pool":
        """A pool of all the questions."""
        questions = list(questions)
        return cls([q for q in questions if q.open], [q for q in questions if not q.open])

    def draw(self, rng: random.Random, open_share: float) -> Question:
        """A random question, open with probability `open_share`; of the other kind if the pool lacks one."""
        if rng.random() < open_share:
            return rng.choice(self.open or self.closed)
        return rng.choice(self.closed or self.open)


def official(split: str) -> list[Question]:
    """All questions of easy-VQA's "train" (38,575) or "test" split (9,673), in the order of its file."""
    rows = json.loads((parts.locate(parts.QUESTIONS) / "data" / split / "questions.json").read_text())
    seen: dict[int, dict[str, str]] = {}
    for text, answer, number in rows:
        if answer in COLORS or answer in SHAPES:
            for word in (answer, *text.rstrip("?").split()):
                kind = "color" if word in COLORS else "shape" if word in SHAPES else None
                if kind:
                    seen.setdefault(number, {})[kind] = word
    facts = {number: f"{fact['color']} {fact['shape']}" for number, fact in seen.items() if len(fact) == 2}
    return [Question(text, answer, Picture(split, number), facts.get(number)) for text, answer, number in rows]


@functools.cache
def held_out() -> frozenset[int]:
    """Numbers of the 400 of the 4,000 train images that are excluded from training; the validation split uses them."""
    return frozenset(random.Random("held out").sample(range(4000), 400))


def png(picture: Picture) -> bytes:
    """The picture as a PNG file: 64×64 RGB."""
    if picture.source != "empty":
        folder = parts.locate(parts.QUESTIONS) / "data" / picture.source / "images"
        return (folder / f"{picture.number}.png").read_bytes()
    buffer = io.BytesIO()
    _empty(picture.number).save(buffer, format="PNG")
    return buffer.getvalue()


def _empty(number: int) -> Image.Image:
    """An image without a shape: a light background as in easy-VQA, one plain colour, or noise."""
    noise = numpy.random.default_rng([number, 64])
    base = noise.integers(228, 256, size=3)
    if number % 5 in (2, 3):
        base = noise.integers(0, 256, size=3)
    pixels = numpy.broadcast_to(base, (64, 64, 3)).astype(float)
    if number % 5 in (3, 4):
        pixels = pixels + noise.normal(0, noise.uniform(20, 120), size=(64, 64, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(numpy.uint8))


def vqav2(question: Question, number: int) -> Document:
    """A VQAv2 document with id `number`; all ten annotators agree, since easy-VQA has one right answer."""
    answer = {"answer": question.answer, "answer_confidence": "yes"}
    return {
        "question_type": " ".join(question.text.rstrip("?").split()[:2]),
        "multiple_choice_answer": question.answer,
        "answers": [answer | {"answer_id": index} for index in range(1, 11)],
        "image_id": question.picture.number,
        "answer_type": "other" if question.open else "yes/no",
        "question_id": number,
        "question": question.text.capitalize(),
        "image": question.picture,
    }


def vizwiz(question: Question, number: int, empty: Picture | None = None) -> Document:
    """A VizWiz document; with `empty`, the question is about that picture instead, and cannot be answered."""
    answer = UNANSWERABLE if empty else question.answer
    return {
        "question_id": f"VizWiz_stand_in_{number:08d}.jpg",
        "image": empty or question.picture,
        "question": question.text.capitalize(),
        "answers": [answer] * 10,
        "category": UNANSWERABLE if empty else "other" if question.open else "yes/no",
    }


def scienceqa(question: Question, rng: random.Random, text_only: bool = False) -> Document:
    """A ScienceQA document about the question's picture, or (`text_only`) about its fact described in words.

    The fact is in the hint or, one time in three, in the question itself, so that documents with an image, with text
    and with neither as context occur, as in ScienceQA.
    """
    kind = "color" if question.answer in COLORS else "shape" if question.answer in SHAPES else "presence"
    pool = {"color": COLORS, "shape": SHAPES, "presence": ("yes", "no")}[kind]
    others = [choice for choice in pool if choice != question.answer]
    choices = [question.answer, *rng.sample(others, min(len(others), rng.choice((2, 3))))]
    rng.shuffle(choices)
    text, hint = question.text.capitalize(), rng.choice(("", "The image shows one shape on a plain background."))
    if text_only:
        sentence = rng.choice(FACTS).format(fact=question.fact)
        text, hint = (f"{sentence} {text}", "") if rng.random() < 1 / 3 else (text, sentence)
    return {
        "image": None if text_only else question.picture,
        "question": text,
        "choices": choices,
        "answer": choices.index(question.answer),
        "hint": hint,
        "task": "yes or no" if kind == "presence" else "closed choice",
        "grade": f"grade{rng.randint(1, 12)}",
        **LABELS[kind],
        "lecture": "A plane figure has one outline and, when it is filled, one color.",
        "solution": f"The answer is {question.answer}.",
    }


FACTS = (
    "The picture shows a {fact}.",
    "A {fact} is drawn on the page.",
    "There is one shape on the card: a {fact}.",
    "The only shape in the image is a {fact}.",
)
# ScienceQA's own subjects, one for each kind of question, so that breakdowns by subject have every row.
LABELS = {
    "color": {
        "subject": "natural science",
        "topic": "physics",
        "category": "Light and color",
        "skill": "Identify the color of a shape",
    },
    "shape": {
        "subject": "social science",
        "topic": "geography",
        "category": "Signs and maps",
        "skill": "Identify a shape",
    },
    "presence": {
        "subject": "language science",
        "topic": "reading-comprehension",
        "category": "Statements",
        "skill": "Decide whether a statement is true",
    },
}


@dataclass(frozen=True)
class Benchmark:
    """The `prompt` that lmms-eval makes of a document of this benchmark, and the `answer` that its scorer expects."""

    prompt: Callable[[Document], str]
    answer: Callable[[Document], str]


def _scienceqa_prompt(doc: Document) -> str:
    context = f"Context: {doc['hint']}\n" if doc["hint"] else ""
    choices = "\n".join(f"{_letter(index)}. {choice}" for index, choice in enumerate(doc["choices"]))
    return f"{context}{doc['question']}\n{choices}\nAnswer with the option's letter from the given choices directly."


def _letter(index: int) -> str:
    return "ABCDE"[index]


SCIENCEQA = Benchmark(prompt=_scienceqa_prompt, answer=lambda doc: _letter(doc["answer"]))
VIZWIZ = Benchmark(
    prompt=lambda doc: (
        f"{doc['question'].capitalize()}\nWhen the provided information is insufficient, respond with "
        "'Unanswerable'.\nAnswer the question using a single word or phrase."
    ),
    answer=lambda doc: doc["answers"][0],
)
VQAV2 = Benchmark(
    prompt=lambda doc: f"{doc['question']}\nAnswer the question using a single word or phrase.",
    answer=lambda doc: doc["multiple_choice_answer"],
)


@dataclass(frozen=True)
class Example:
    """One rendered question: the user's text, the right answer and the picture it is about, if any."""

    prompt: str
    answer: str
    picture: Picture | None


def example(benchmark: Benchmark, doc: Document) -> Example:
    """The document with the harness's prompt."""
    return Example(benchmark.prompt(doc), benchmark.answer(doc), doc["image"])


def text_only_document(pool: Pool, rng: random.Random, open_share: float, split: str) -> Document:
    """A text-only ScienceQA document of `split` about a question of the pool, all of whose facts are known.

    A hash of the prompt decides its split, as there is no picture that could: no prompt occurs in two of "train",
    "validation" and "test".
    """
    while True:
        doc = scienceqa(pool.draw(rng, open_share), rng, text_only=True)
        digit = hashlib.sha256(SCIENCEQA.prompt(doc).encode()).digest()[0] % 8
        if split == {0: "test", 1: "test", 2: "validation"}.get(digit, "train"):
            return doc
