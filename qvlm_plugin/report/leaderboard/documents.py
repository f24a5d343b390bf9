"""The documents of a samples file, and their scores."""

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.reading import parse_json
from qvlm_plugin.report.samples import score_of


@dataclass(frozen=True)
class Marks:
    """The documents of one run that have its main metric, by ascending id.

    Attributes:
        metric: name of the main metric.
        ids: int64[n].
        scores: scores by the main metric, float32[n].
        images: hash of each document's images, int64[n]; equal hashes are the same images. A document without images,
            or with unknown ones, has a hash of its own.
        outcomes: hash of each document's answer and score, int64[n].
    """

    metric: str
    ids: np.ndarray
    scores: np.ndarray
    images: np.ndarray
    outcomes: np.ndarray


@dataclass(frozen=True)
class Coverage:
    """Summary of a samples file.

    Attributes:
        count: number of documents.
        digest: SHA-256 over their ids, targets and prompts, independent of their order.
        means: mean of each numeric metric over the documents that have it.
        unknown_images: number of documents for which images are not recorded.
        marks: its documents with the main metric; None if none has it.
    """

    count: int
    digest: str
    means: dict[str, float]
    unknown_images: int = 0
    marks: Marks | None = field(default=None, compare=False)


def read_coverage(file: Path, metric: str | None = None) -> Coverage:
    """Read a samples file line by line.

    Args:
        file: the samples file.
        metric: the main metric, of which each document's score is kept; None keeps no scores.

    Raises:
        QVLMError: it is not a complete samples file, or has a document twice, or a score that is not finite.
    """
    seen: set[int] = set()
    total, number, unknown_images = 0, 0, 0
    sums: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    marks: list[tuple[int, float, int, int]] = []
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):  # noqa: B007
                sample = parse_json(line)
                index = sample["doc_id"]
                if index in seen:
                    raise QVLMError(f"{file} has document {index} twice")
                seen.add(index)
                text = f"{index}\0{sample['target']}\0{sample['input']}"
                # A sum is independent of the order, which differs if several processes write.
                total += int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=32).digest())
                unknown_images += "input_media" not in sample
                for name, value in sample.items():
                    if (score := score_of(value)) is not None and name != "doc_id":
                        sums[name] += score
                        counts[name] += 1
                if metric is not None and (score := score_of(sample.get(metric))) is not None:
                    image = sample.get("input_media") or f"document {index}"
                    marks.append((index, score, _short_hash(image), _short_hash([sample.get("filtered_resps"), score])))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise QVLMError(f"{file} is not a samples file of lmms-eval: line {number}: {error!r}") from error
    if wrong := [name for name, value in sums.items() if not math.isfinite(value)]:
        raise QVLMError(f"{file} has a score that is not finite: {wrong[0]}")
    content = f"{len(seen)} {total % 2**256:064x}"
    means = {name: value / counts[name] for name, value in sums.items()}
    digest = hashlib.sha256(content.encode()).hexdigest()
    return Coverage(len(seen), digest, means, unknown_images, _marks(metric, marks))


def _marks(metric: str | None, rows: Sequence[tuple[int, float, int, int]]) -> Marks | None:
    if metric is None or not rows or not all(isinstance(row[0], int) and 0 <= row[0] < 2**63 for row in rows):
        return None
    ids, scores, images, outcomes = zip(*sorted(rows), strict=True)
    ids, images, outcomes = (np.array(values, np.int64) for values in (ids, images, outcomes))
    with np.errstate(over="ignore"):
        scores = np.array(scores, np.float32)
    return Marks(metric, ids, scores, images, outcomes) if np.isfinite(scores).all() else None


def _short_hash(value: Any) -> int:
    digest = hashlib.blake2b(json.dumps(value).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)
