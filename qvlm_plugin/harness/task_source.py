"""Calibration documents from the harness's own task definitions: rendered exactly as they are when evaluated."""

import difflib
import random
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from lmms_eval.api.task import ConfigurableTask
from lmms_eval.tasks import TaskManager, get_task_dict
from tenacity import RetryError

from qvlm_plugin.calibration import CalibrationSet, Sample, Source, parse_sources, read_conversations
from qvlm_plugin.conversation import Conversation
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.harness.manifest import MODEL_ID
from qvlm_plugin.harness.requests import from_messages, from_visuals


def read_calibration(
    text: str, images: Path | None = None, seed: int = 0, *, chat: bool = True, allow_overlap: bool = False
) -> CalibrationSet:
    """Draw the samples that ``calibration=`` names, from tasks and from files.

    Args:
        text: ``task:split:n`` and ``file.json:n``, joined by ``+``.
        images: folder of the images that files name.
        seed: of the draw.
        chat: render tasks in the harness's chat format, else in its simple one.
        allow_overlap: let a task's evaluated split be drawn from.

    Raises:
        QVLMError: a source is unknown, unreadable, or has too few documents with an image.
    """
    sources = parse_sources(text)
    tasks = _load_tasks({source.location for source in sources if source.split is not None}, chat)
    samples: list[Sample] = []
    for source in sources:
        if source.split is None:
            samples += read_conversations(Path(source.location), images, source.count, seed)
        else:
            samples += _draw(source, tasks[source.location], seed, chat, allow_overlap)
    return CalibrationSet(tuple(samples), text, seed)


def _draw(source: Source, task: ConfigurableTask, seed: int, chat: bool, allow_overlap: bool) -> list[Sample]:
    evaluated = task.config.test_split or task.config.validation_split
    splits = [split for split in task.dataset if allow_overlap or split != evaluated]
    if source.split not in splits:
        why = "is what the task evaluates" if source.split == evaluated else "does not exist"
        raise QVLMError(
            f"calibration={source.location}:{source.split}: the split {why}; "
            f"allowed are {', '.join(splits) or 'none of this task, so take another'}"
        )
    documents = task.dataset[source.split]
    config = task.config
    processed = (config.training_split, config.validation_split, config.test_split, config.fewshot_split)
    if config.process_docs is not None and source.split not in processed:
        documents = config.process_docs(documents)
    drawn: dict[int, Sample] = {}
    for index in random.Random(seed).sample(range(len(documents)), len(documents)):
        document = documents[index]
        conversation = _render(task, document, chat)
        if conversation.images:
            drawn[index] = Sample(conversation, _answer(task, document, source))
        if len(drawn) == source.count:
            return [drawn[index] for index in sorted(drawn)]
    raise QVLMError(
        f"calibration={source.location}:{source.split}:{source.count}: only {len(drawn)} documents have an image"
    )


def _load_tasks(names: Collection[str], chat: bool) -> dict[str, ConfigurableTask]:
    if not names:
        return {}
    manager = TaskManager("ERROR", model_name=MODEL_ID)
    for name in names:
        if name not in manager.all_subtasks:
            similar = difflib.get_close_matches(name, manager.all_subtasks, n=3) or ["scienceqa", "vqav2_val"]
            raise QVLMError(
                f"calibration={name} is neither a task of lmms-eval (similar: {', '.join(similar)}) nor a .json or "
                ".jsonl file"
            )
    return {name: _load_task(name, manager, chat) for name in names}


def _load_task(name: str, manager: TaskManager, chat: bool) -> ConfigurableTask:
    try:
        return get_task_dict([name], manager, "chat" if chat else "simple")[name]
    except Exception as error:  # whatever datasets, the hub client or the retries around them raise
        cause = error.last_attempt.exception() if isinstance(error, RetryError) else error
        raise QVLMError(f"calibration={name}: its data does not load: {' '.join(str(cause).split())}") from error


def _render(task: ConfigurableTask, document: Mapping[str, Any], chat: bool) -> Conversation:
    if chat:
        return from_messages(task.doc_to_messages(document))
    return from_visuals(task.fewshot_context(document, 0), task.doc_to_visual(document))


def _answer(task: ConfigurableTask, document: Mapping[str, Any], source: Source) -> str:
    """What the model should have said: the commonest of several people's answers, else the task's target."""
    answers = document.get("answers")
    if answers:
        if isinstance(answers, Mapping):  # a column of records, as some versions of datasets give it
            answers = answers["answer"]
        return _commonest([answer["answer"] if isinstance(answer, Mapping) else answer for answer in answers])
    target = task.config.doc_to_target
    if isinstance(target, str) and target not in document and "{{" not in target:
        raise QVLMError(f"calibration={source.location}:{source.split}: this split has no answers; take another")
    answer = task.doc_to_target(document)
    if isinstance(answer, int) and task.config.doc_to_choice is not None:
        answer = task.doc_to_choice(document)[answer]
    return _commonest([str(one) for one in answer]) if isinstance(answer, list) else str(answer)


def _commonest(answers: list[str]) -> str:
    return Counter(answers).most_common(1)[0][0]
