"""Calibration documents from the harness's task definitions, with the same prompts as in an evaluation."""

import difflib
import random
from collections import Counter
from collections.abc import Mapping
from functools import cache
from typing import Any

from lmms_eval.api.task import ConfigurableTask
from lmms_eval.tasks import TaskManager, get_task_dict
from tenacity import RetryError

from qvlm_plugin.calibration import Sample
from qvlm_plugin.conversation import Conversation
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.harness import tasks
from qvlm_plugin.harness.host import answers_of, require_whole_images
from qvlm_plugin.harness.manifest import MODEL_ID
from qvlm_plugin.harness.requests import from_messages, from_visuals, with_shallow_images
from qvlm_plugin.reading import parsed_elsewhere


def draw_samples(
    task_name: str, split: str, count: int, seed: int, *, chat: bool = True, allow_overlap: bool = False
) -> list[Sample]:
    """Draw documents with an image from a split of a task.

    Args:
        task_name: one of lmms-eval's tasks.
        split: a split of its data set, other than the one that the task evaluates.
        count: number of documents.
        seed: seed of the draw.
        chat: whether to render in the harness's chat format, or in its simple one.
        allow_overlap: whether the evaluated split is allowed.

    Raises:
        QVLMError: the task or split is unknown, its data cannot be loaded, or too few documents have an image.
    """
    require_whole_images()
    source = f"calibration={task_name}:{split}"
    task = load_task(task_name, chat)
    evaluated = task.config.test_split or task.config.validation_split
    allowed = [name for name in task.dataset if allow_overlap or name != evaluated]
    if split not in allowed:
        reason = "is the one that the task evaluates" if split == evaluated else "does not exist"
        raise QVLMError(
            f"{source}: the split {reason}; allowed are {', '.join(allowed) or 'none of this task; use another task'}"
        )
    drawn = _draw(task, split, count, seed, chat, source)
    if len(drawn) < count:
        raise QVLMError(f"{source}:{count}: only {len(drawn)} documents have an image")
    return [drawn[index] for index in sorted(drawn)]


def _draw(task: ConfigurableTask, split: str, count: int, seed: int, chat: bool, source: str) -> dict[int, Sample]:
    """Up to ``count`` documents with an image, by their index in the split."""
    documents = task.dataset[split]
    config = task.config
    processed = (config.training_split, config.validation_split, config.test_split, config.fewshot_split)
    if config.process_docs is not None and split not in processed:
        with parsed_elsewhere(f"{source}: the task cannot process its documents"):
            documents = config.process_docs(documents)
    drawn: dict[int, Sample] = {}
    for index in random.Random(seed).sample(range(len(documents)), len(documents)):
        if len(drawn) == count:
            break
        with parsed_elsewhere(f"{source}: the task cannot render document {index}"):
            document = with_shallow_images(documents[index])
            conversation = render(task, document, chat)
            if conversation.images:
                drawn[index] = Sample(conversation, answer_of(task, document, source))
    return drawn


@cache
def _task_manager() -> TaskManager:
    tasks.install()
    return TaskManager("ERROR", model_name=MODEL_ID)  # indexing the harness's two thousand tasks takes seconds


def load_task(name: str, chat: bool) -> ConfigurableTask:
    """One of lmms-eval's tasks, with its data.

    Raises:
        QVLMError: the task is unknown, or its data cannot be loaded.
    """
    known = _task_manager().all_subtasks
    if name not in known:
        similar = difflib.get_close_matches(name, known, n=3) or ["scienceqa", "vqav2_val"]
        raise QVLMError(
            f"calibration={name} is neither a task of lmms-eval (similar: {', '.join(similar)}) nor a .json or .jsonl "
            "file"
        )
    try:
        return get_task_dict([name], _task_manager(), "chat" if chat else "simple")[name]
    except Exception as error:  # datasets, the hub client and retries raise all kinds of exceptions
        cause = error.last_attempt.exception() if isinstance(error, RetryError) else error
        raise QVLMError(f"calibration={name}: cannot load its data: {' '.join(str(cause).split())}") from error


def render(task: ConfigurableTask, document: Mapping[str, Any], chat: bool) -> Conversation:
    """A document with the task's prompt, in the harness's chat format or in its simple one."""
    if chat:
        return from_messages(task.doc_to_messages(document))
    return from_visuals(task.fewshot_context(document, 0), task.doc_to_visual(document))


def answer_of(task: ConfigurableTask, document: Mapping[str, Any], source: str) -> str:
    """The reference answer: the most common of several annotators' answers, else the task's target."""
    if answers := document.get("answers"):
        return _most_common(answers_of(answers))
    target = task.config.doc_to_target
    if isinstance(target, str) and target not in document and "{{" not in target:
        raise QVLMError(f"{source}: this split has no answers; use another")
    answer = task.doc_to_target(document)
    if isinstance(answer, int) and task.config.doc_to_choice is not None:
        answer = task.doc_to_choice(document)[answer]
    return _most_common([str(text) for text in answer]) if isinstance(answer, list) else str(answer)


def _most_common(answers: list[str]) -> str:
    return Counter(answers).most_common(1)[0][0]
