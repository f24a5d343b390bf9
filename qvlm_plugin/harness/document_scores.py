"""Add scores of single documents to tasks that log records without one.

lmms-eval's MMMU and SEED-Bench compute their score from all records at once. Paired tests need each document's score;
lmms-eval's own tests look for it in a record's ``score``.
"""

import contextlib
import io
from collections.abc import Callable, Mapping, Sequence
from threading import Lock
from typing import Any

from lmms_eval.api.task import ConfigurableTask

from qvlm_plugin.harness.host import wrap_once

SINGLE_RECORD_METRICS = frozenset({"mmmu_acc", "seed_all", "seed_image", "seed_video"})
"""Metrics whose aggregation of a single record is that document's score, with no side effect except printing."""

_STDOUT_LOCK = Lock()


def install() -> None:
    """Add scores to the records of these metrics. Idempotent."""
    wrap_once(ConfigurableTask, "process_results", _scoring_records)


def _scoring_records(process: Callable) -> Callable:
    def process_results(self: ConfigurableTask, doc: Mapping[str, Any], results: Sequence, **kwargs: Any) -> dict:
        found = process(self, doc, results, **kwargs)
        for metric in SINGLE_RECORD_METRICS & self.aggregation().keys() & found.keys():
            if isinstance(record := found[metric], dict) and "score" not in record:
                with _STDOUT_LOCK, contextlib.redirect_stdout(io.StringIO()):
                    score = self.aggregation()[metric]([record])
                found[metric] = {**record, "score": score}
        return found

    return process_results
