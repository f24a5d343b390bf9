"""What a samples file covers: which documents, and the scores it gives them."""

import hashlib
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.reading import parse_json


@dataclass(frozen=True)
class Coverage:
    """A samples file in short.

    Attributes:
        count: how many documents it has.
        digest: SHA-256 over their ids, targets and prompts, whatever their order.
        means: of each numeric metric, over the documents that have it.
        untold: of how many documents it does not tell the images, nor that there are none.
    """

    count: int
    digest: str
    means: dict[str, float]
    untold: int = 0


def read_coverage(file: Path) -> Coverage:
    """Read a samples file row by row.

    Raises:
        QVLMError: it is not a whole samples file, or has a document twice, or a score that is no number.
    """
    seen: set[int] = set()
    total, number, untold = 0, 0, 0
    sums: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):  # noqa: B007
                sample = parse_json(line)
                index = sample["doc_id"]
                if index in seen:
                    raise QVLMError(f"{file} has document {index} twice")
                seen.add(index)
                text = f"{index}\0{sample['target']}\0{sample['input']}"
                # A sum does not depend on the order, in which several processes may write.
                total += int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=32).digest())
                untold += "input_media" not in sample
                for name, value in sample.items():
                    if isinstance(value, int | float) and name != "doc_id":
                        sums[name] += value
                        counts[name] += 1
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise QVLMError(f"{file} is not a samples file of lmms-eval: line {number}: {error!r}") from error
    if wrong := [name for name, value in sums.items() if not math.isfinite(value)]:
        raise QVLMError(f"{file} has a score that is no number: {wrong[0]}")
    content = f"{len(seen)} {total % 2**256:064x}"
    means = {name: value / counts[name] for name, value in sums.items()}
    return Coverage(len(seen), hashlib.sha256(content.encode()).hexdigest(), means, untold)
