"""Exact match with one forward pass per question: every token of the right answer and its end must be the most likely.

This is equivalent to greedy decoding of exactly the right answer. The two scores can differ if a task's scorer accepts
more than the reference answer, or if sums in another order change a close decision; `benchmarks/seeds.py
agreement` counts these documents. Questions about the same image share the computation of their common prefix, which
makes this two to three times as fast as generation.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel

from qvlm_plugin.conversation import Conversation, encode, render_answer
from qvlm_plugin.harness.task_source import answer_of, load_task, render
from qvlm_plugin.models.loading import LoadedModel

IMAGES_AT_A_TIME, QUESTIONS_AT_A_TIME = 32, 32


@dataclass(frozen=True, eq=False)
class Question:
    """A document as the model reads it.

    Attributes:
        task, id: the document.
        image: digest of its image; None without one.
        target: the reference answer.
        pixels: the image, float[1, C, H, W]; None without one.
        prefix: tokens up to the image's last one, int64[P]; empty without an image.
        tail: the tokens after that, the answer's included, int64[T].
        answered: number of answer tokens at the end of the tail.
    """

    task: str
    id: int
    image: str | None
    target: str
    pixels: Tensor | None
    prefix: Tensor
    tail: Tensor
    answered: int


def read_questions(loaded: LoadedModel, tasks: Sequence[str], limit: int) -> list[Question]:
    """The first documents of each task's evaluated split, with the harness's own prompts and chat template."""
    found = []
    for name in tasks:
        task = load_task(name, chat=True)
        for index, document in zip(range(limit), tqdm(task.eval_docs, f"reading {name}", limit), strict=False):
            conversation, target = render(task, document, chat=True), answer_of(task, document, name)
            found.append(question_of(loaded, name, index, conversation, target))
    return found


def question_of(loaded: LoadedModel, task: str, index: int, conversation: Conversation, target: str) -> Question:
    """The document ``index`` of a task as the model reads it, with the right answer."""
    answer = render_answer(loaded.processor, conversation, target)
    inputs, mask = encode(loaded.processor, [conversation], [answer])
    (tokens,) = inputs["input_ids"]
    shown = (tokens == loaded.model.config.image_token_id).nonzero()
    start = int(shown[-1]) + 1 if len(shown) else 0
    return Question(
        task=task,
        id=index,
        image=conversation.image_digest(),
        target=target,
        pixels=inputs.get("pixel_values"),
        prefix=tokens[:start],
        tail=tokens[start:],
        answered=int(mask.sum()),
    )


@torch.inference_mode()
def exact_matches(
    model: PreTrainedModel, questions: Sequence[Question], first: DynamicCache | None = None
) -> dict[tuple[str, int], bool]:
    """Whether the model answers each document exactly, by task and id.

    Args:
        model: the model.
        questions: the documents.
        first: keys and values of tokens that precede every question's own.
    """
    found = {}
    first = DynamicCache(config=model.config.get_text_config()) if first is None else first
    with tqdm(total=len(questions), desc="answering", mininterval=10) as progress:
        for batch in _by_images(questions):
            cache = _read_images(model, batch, copy.deepcopy(first))
            rows = {image: row for row, image in enumerate(dict.fromkeys(question.image for question in batch))}
            batch = sorted(batch, key=lambda question: len(question.tail))
            for start in range(0, len(batch), QUESTIONS_AT_A_TIME):
                chunk = batch[start : start + QUESTIONS_AT_A_TIME]
                own = copy.deepcopy(cache)
                own.batch_select_indices(torch.tensor([rows[question.image] for question in chunk]))
                for question, exact in zip(chunk, _answered(model, chunk, own), strict=True):
                    found[question.task, question.id] = exact
                progress.update(len(chunk))
    return found


def _by_images(questions: Sequence[Question]) -> Iterator[list[Question]]:
    """Batches with all questions about a number of images; questions without an image are a batch of their own."""
    if plain := [question for question in questions if question.image is None]:
        yield plain
    shown = sorted((question for question in questions if question.image is not None), key=attrgetter("image"))
    groups = [list(group) for _, group in groupby(shown, attrgetter("image"))]
    for start in range(0, len(groups), IMAGES_AT_A_TIME):
        yield [question for group in groups[start : start + IMAGES_AT_A_TIME] for question in group]


def _read_images(model: PreTrainedModel, questions: Sequence[Question], cache: DynamicCache) -> DynamicCache:
    """The cache, with keys and values of the questions' prefixes added; a row for each image."""
    first = questions[0]
    if first.image is None:
        return cache
    if any(not torch.equal(question.prefix, first.prefix) for question in questions):
        raise ValueError("prompts differ before or within the image, so that its computation cannot be shared")
    pixels = torch.cat([*{question.image: question.pixels for question in questions}.values()]).to(model.dtype)
    before = int((first.prefix == model.config.image_token_id).nonzero()[0])
    if before:
        model.model(input_ids=first.prefix[None, :before], past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(len(pixels))
    within = first.prefix[before:].expand(len(pixels), -1)
    model.model(input_ids=within, pixel_values=pixels, past_key_values=cache, use_cache=True)
    return cache


def _answered(model: PreTrainedModel, questions: Sequence[Question], cache: DynamicCache) -> list[bool]:
    """Whether each question is answered exactly; padding is on the right, where no token attends to it."""
    tails = pad_sequence([question.tail for question in questions], batch_first=True)
    lengths = torch.tensor([len(question.tail) for question in questions])
    start, width = cache.get_seq_length(), tails.shape[1]
    hidden = model.model(
        input_ids=tails,
        attention_mask=(torch.arange(start + width) < (start + lengths)[:, None]).long(),
        position_ids=torch.arange(start, start + width).expand_as(tails),
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    found = []
    for row, question in enumerate(questions):
        end, targets = len(question.tail), question.tail[-question.answered :]
        predicted = model.lm_head(hidden[row, end - question.answered - 1 : end - 1]).argmax(dim=-1)
        found.append(torch.equal(predicted, targets))
    return found
