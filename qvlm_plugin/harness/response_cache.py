"""lmms-eval's response cache (``--use_cache``) for this package's models.

By itself it keys answers on the text of ``--model_args``, which does not change when a plan, a checkpoint or a local
data set behind the same name does; it keeps answers only when all have come, and those of a run that failed are never
looked at again. Here answers are distinguished by content and kept batch by batch; a batch that fails does not keep the
others from being answered; and a run's record counts the answers that were found, too.
"""

import hashlib
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.caching.response_cache import ResponseCache, extract_gen_kwargs, is_deterministic
from loguru import logger

from qvlm_plugin.harness import processes
from qvlm_plugin.harness.host import set_response_key, wrap_once
from qvlm_plugin.harness.likelihood import Likelihood
from qvlm_plugin.harness.manifest import MODEL_IDS
from qvlm_plugin.models.finite import OverflowingModelError
from qvlm_plugin.progress import Progress

_MERGED = ".merged"


def install() -> None:
    """Let lmms-eval's response cache do so. Repeating it changes nothing."""
    wrap_once(ResponseCache, "create", _with_what_was_left)
    wrap_once(ResponseCache, "execute", _by_batches)


def _with_what_was_left(create: Callable) -> Callable:
    def create_with_what_was_left(cache_root: str, *, model: str = "", **more: Any) -> ResponseCache:
        if model not in MODEL_IDS:
            return create(cache_root, model=model, **more)
        with processes.first_process_first():
            if processes.rank() == 0:
                take_up(Path(cache_root).parent if cache_root.endswith(".db") else Path(cache_root))
            return create(cache_root, model=model, **more)

    return create_with_what_was_left


def take_up(root: Path) -> None:
    """Bring answers into the cache that runs left behind which did not come to their end."""
    for run in sorted((root / "runs").glob("*")):
        shards = sorted(run.glob("rank_*.db"))
        merged = run / _MERGED
        newest = max((file.stat().st_mtime for file in run.glob("rank_*.db*")), default=0)
        if merged.is_file() and merged.stat().st_mtime >= newest:
            continue
        for shard in shards:
            try:
                ResponseCache.merge_shards([str(shard)], str(root / "cache.db"))
            except sqlite3.Error as error:
                logger.warning(f"answers in {str(shard)!r} cannot be used: {error}")


def _by_batches(execute: Callable) -> Callable:
    def execute_by_batches(self: ResponseCache, lm: Any, reqtype: str, requests: Sequence[Instance]) -> list:
        if not hasattr(lm, "response_identity"):
            return execute(self, lm, reqtype, requests)
        identity = f"{self.model_fingerprint}|{lm.response_identity()}"
        set_response_key(self, hashlib.sha256(identity.encode()).hexdigest())
        items = lm.prepare(reqtype, requests)
        responses: list[Any] = [None] * len(requests)
        found, failures, asked = [], [], set()

        def ask(batch: Sequence[Instance]) -> list:
            asked.update(map(id, batch))
            return getattr(lm, reqtype)(batch)

        with Progress("answering", len(requests), lm.rank == 0) as progress, _quietly():
            for rows in _batches(lm, reqtype, requests, items):
                try:
                    batch = execute(self, SimpleNamespace(**{reqtype: ask}), reqtype, [requests[row] for row in rows])
                except Exception as error:  # one bad document; the others' answers shall be there when it is mended
                    failures.append(error)
                    if isinstance(error.__cause__, OverflowingModelError):
                        break
                    continue
                for row, response in zip(rows, batch, strict=True):
                    responses[row] = _as_given(reqtype, response)
                    found += [row] if id(requests[row]) not in asked else []
                progress.advance(len(rows))
        for error in failures[1:]:
            logger.error(str(error))
        if failures:
            raise failures[0]
        logger.info(f"{len(found)} of {len(requests)} answers were found in the response cache")
        lm.note_found([items[row] for row in found], [responses[row] for row in found])
        return responses

    return execute_by_batches


def _batches(lm: Any, reqtype: str, requests: Sequence[Instance], items: Sequence[Any]) -> Iterator[list[int]]:
    """Rows to be answered together: those that can be cached by batches, sampled answers all at once, by one seed."""
    cached = [is_deterministic(reqtype, extract_gen_kwargs(request)) for request in requests]
    rows = [row for row, is_cached in enumerate(cached) if is_cached]
    for batch in lm.batches([items[row] for row in rows]):
        yield [rows[index] for index in batch]
    if sampled := [row for row, is_cached in enumerate(cached) if not is_cached]:
        yield sampled


def _as_given(reqtype: str, response: Any) -> Any:
    """A response as the model gives it: likelihoods come as lists out of the cache."""
    return Likelihood(*response) if reqtype == "loglikelihood" else response


@contextmanager
def _quietly() -> Iterator[None]:
    """Without what the cache logs of each batch."""
    logger.disable(ResponseCache.__module__)
    try:
        yield
    finally:
        logger.enable(ResponseCache.__module__)
