"""lmms-eval's response cache (``--use_cache``) for this package's models.

lmms-eval keys answers on the text of ``--model_args``, which stays the same if the plan, checkpoint or local data set
of that name changes. It stores answers only after all requests are answered, and ignores those of failed runs. Here
keys depend on content, answers are stored batch by batch, a failed batch does not stop the others, and the run's record
includes answers found in the cache.
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
    """Change lmms-eval's response cache. Idempotent."""
    wrap_once(ResponseCache, "create", _recovering)
    wrap_once(ResponseCache, "execute", _by_batches)


def _recovering(create: Callable) -> Callable:
    def create_and_recover(cache_root: str, *, model: str = "", **more: Any) -> ResponseCache:
        if model not in MODEL_IDS:
            return create(cache_root, model=model, **more)
        with processes.first_process_first():
            if processes.rank() == 0:
                recover(Path(cache_root).parent if cache_root.endswith(".db") else Path(cache_root))
            return create(cache_root, model=model, **more)

    return create_and_recover


def recover(root: Path) -> None:
    """Merge the answers of interrupted runs into the cache."""
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
                logger.warning(f"cannot use the answers in {str(shard)!r}: {error}")


def _by_batches(execute: Callable) -> Callable:
    def execute_by_batches(self: ResponseCache, lm: Any, reqtype: str, requests: Sequence[Instance]) -> list:
        if not hasattr(lm, "response_identity"):
            return execute(self, lm, reqtype, requests)
        identity = f"{self.model_fingerprint}|{lm.response_identity()}"
        set_response_key(self, hashlib.sha256(identity.encode()).hexdigest())
        items = lm.prepare(reqtype, requests)
        responses: list[Any] = [None] * len(requests)
        found, failures, generated = [], [], set()

        def answer(batch: Sequence[Instance]) -> list:
            generated.update(map(id, batch))
            return getattr(lm, reqtype)(batch)

        with Progress("answering", len(requests), lm.rank == 0) as progress, _quietly():
            for rows in _batches(lm, reqtype, requests, items):
                try:
                    model = SimpleNamespace(**{reqtype: answer})
                    batch = execute(self, model, reqtype, [requests[row] for row in rows])
                except Exception as error:  # a bad document; the next run then finds the other answers in the cache
                    failures.append(error)
                    if isinstance(error.__cause__, OverflowingModelError):
                        break
                    continue
                for row, response in zip(rows, batch, strict=True):
                    responses[row] = _from_json(reqtype, response)
                    found += [row] if id(requests[row]) not in generated else []
                progress.advance(len(rows))
        for error in failures[1:]:
            logger.error(str(error))
        if failures:
            raise failures[0]
        logger.info(f"{len(found)} of {len(requests)} answers found in the response cache")
        lm.note_found([items[row] for row in found], [responses[row] for row in found])
        return responses

    return execute_by_batches


def _batches(lm: Any, reqtype: str, requests: Sequence[Instance], items: Sequence[Any]) -> Iterator[list[int]]:
    """Rows to answer together: cacheable ones in batches, sampled ones all at once with one seed."""
    cached = [is_deterministic(reqtype, extract_gen_kwargs(request)) for request in requests]
    rows = [row for row, is_cached in enumerate(cached) if is_cached]
    for batch in lm.batches([items[row] for row in rows]):
        yield [rows[index] for index in batch]
    if sampled := [row for row, is_cached in enumerate(cached) if not is_cached]:
        yield sampled


def _from_json(reqtype: str, response: Any) -> Any:
    """A response as the model returns it: the cache returns likelihoods as lists."""
    return Likelihood(*response) if reqtype == "loglikelihood" else response


@contextmanager
def _quietly() -> Iterator[None]:
    """Suppress what the cache logs for each batch."""
    logger.disable(ResponseCache.__module__)
    try:
        yield
    finally:
        logger.enable(ResponseCache.__module__)
