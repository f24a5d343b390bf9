"""Write thumbnails of the images of a finished run, so that the leaderboard's page can show them.

Samples record a digest of each document's images, not the images. They are read again from the task's data, and a
thumbnail is written only if the digest matches.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qvlm_plugin.atomic import write_file
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.harness.requests import with_shallow_images
from qvlm_plugin.harness.task_source import load_task, render
from qvlm_plugin.reading import parse_json, parsed_elsewhere
from qvlm_plugin.report.leaderboard.pictures import recorded_digest, thumbnail, thumbnail_file
from qvlm_plugin.report.leaderboard.schema import read_results_file, samples_file


def write_thumbnails(results: Path) -> int:
    """Write a thumbnail of each document's first image into ``thumbnails/`` next to the samples.

    Args:
        results: results file of a run of this package with ``--log_samples``; its tasks' data must be readable from
            the working directory.

    Returns:
        The number of thumbnails written; existing ones are kept.

    Raises:
        QVLMError: the run records no images, or the task's data are not those that were evaluated.
    """
    *_, parsed = read_results_file(results)
    if parsed.qvlm is None:
        raise QVLMError(f"{results} has no provenance: only runs of --model qvlm record digests of images")
    files = {task: samples_file(results, task) for task in parsed.counts}
    if missing := [file for file in files.values() if not file.is_file()]:
        raise QVLMError(f"{results}: no {missing[0].name} in the same folder; run lmms-eval with --log_samples")
    return sum(_write_task(task, file, parsed.qvlm.prompt_format != "simple") for task, file in files.items())


def _write_task(name: str, samples: Path, chat: bool) -> int:
    wanted = {digest: index for index, digest in _recorded(samples)}
    wanted = {digest: index for digest, index in wanted.items() if not thumbnail_file(samples.parent, digest).exists()}
    if not wanted:
        return 0
    task = load_task(name, chat)
    documents = task.dataset[task.config.test_split or task.config.validation_split]
    for digest, index in wanted.items():
        with parsed_elsewhere(f"{samples}: the task cannot render document {index}"):
            conversation = render(task, with_shallow_images(documents[index]), chat)
        if conversation.image_digest() != digest:
            raise QVLMError(f"{samples}: the image of document {index} of {name} is not the one that was evaluated")
        write_file(thumbnail_file(samples.parent, digest), thumbnail(conversation.images[0]))
    return len(wanted)


def _recorded(samples: Path) -> Iterator[tuple[int, str]]:
    """Each document's id and the digest of its images, if it has images."""
    with samples.open("rb") as lines:
        for line in lines:
            sample: dict[str, Any] = parse_json(line)
            if digest := recorded_digest(sample.get("input_media")):
                yield sample["doc_id"], digest
