"""A search by several processes: each runs its share of the batches, and results are combined in the batches' order.

Sums are taken in the order of the batches, as a single process takes them, so that all processes have bitwise equal
drafts and make the same choices.
"""

import atexit
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from accelerate.utils import send_to_device

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.reading import one_line

Item = TypeVar("Item")
Key = TypeVar("Key")

_TIMEOUT = timedelta(days=7)
"""Timeout of waiting for other processes, for example while one of them trains the vision tower."""


class _PeerError(QVLMError):
    """Another process failed."""


class _PeerOutOfMemoryError(torch.OutOfMemoryError):
    """Another process ran out of memory."""


@dataclass(frozen=True)
class Shard:
    """The share of one process.

    All processes must call `gathered`, `run_on`, `first` and `together` in the same order.

    Attributes:
        rank, count: index of this process, and number of processes.
    """

    rank: int = 0
    count: int = 1

    def own(self, items: Sequence[Item]) -> Sequence[Item]:
        """This process's contiguous part of the items."""
        return items[len(items) * self.rank // self.count : len(items) * (self.rank + 1) // self.count]

    def gathered(self, part: Sequence[Item]) -> list[Item]:
        """The parts of all processes, in order; with several processes, tensors are moved to the CPU.

        Raises:
            QVLMError, torch.OutOfMemoryError: another process failed instead.
        """
        if self.count == 1:
            return list(part)
        return [item for _, others in self._exchange("part", send_to_device(list(part), "cpu")) for item in others]

    def run_on(self, rank: int, run: Callable[[], Item]) -> Item:
        """Let one process call ``run``, and return its result in all; with several, tensors are moved to the CPU.

        Raises:
            QVLMError, torch.OutOfMemoryError: another process failed instead.
        """
        result = run() if rank == self.rank else None
        if self.count == 1:
            return result
        self.gathered(())
        content = [send_to_device(result, "cpu")]
        dist.broadcast_object_list(content, src=rank)
        return content[0]

    def first(self, run: Callable[[], Item]) -> Item:
        """Let the first process call ``run``, and return its result in all."""
        return self.run_on(0, run)

    @contextmanager
    def together(self) -> Iterator[None]:
        """A context for work that fails in all processes if it fails in one.

        Raises:
            QVLMError, torch.OutOfMemoryError: another process failed.
        """
        try:
            yield
            self.gathered(())
        except (_PeerError, _PeerOutOfMemoryError):
            raise
        except BaseException as error:
            if self.count > 1:
                memory = isinstance(error, torch.OutOfMemoryError)
                self._exchange("failed", (memory, f"process {self.rank}: {one_line(error)}"), check=False)
            raise

    def _exchange(self, kind: str, content: Any, check: bool = True) -> list[tuple[str, Any]]:
        answers: list[Any] = [None] * self.count
        dist.all_gather_object(answers, (kind, content))
        for outcome, detail in answers if check else ():
            if outcome == "failed":
                memory, message = detail
                raise (_PeerOutOfMemoryError if memory else _PeerError)(message)
        return answers


class OrderedSum(Generic[Key, Item]):
    """Sums by key over the batches of all processes, in the order of the batches.

    A single process adds at once. With several, each keeps its batches on the CPU until the processes before it have
    added theirs, so that only the sums (a few matrices [K, K]) are passed from one to the next.

    Attributes:
        shard: this process's shard.
    """

    def __init__(self, shard: Shard) -> None:
        """Start with no sums."""
        self.shard = shard
        self._totals: dict[Key, Item] = {}
        self._batches: list[dict[Key, Item]] = []

    def add(self, found: dict[Key, Item]) -> None:
        """Add the values of this process's next batch, which must support ``+``."""
        if self.shard.count == 1:
            _add(self._totals, found)
        else:
            self._batches.append(send_to_device(dict(found), "cpu"))

    def total(self) -> dict[Key, Item]:
        """Return the sums in all processes, with keys in the order in which they were first added."""
        for rank in range(self.shard.count):
            self._totals = self.shard.run_on(rank, self._with_own)
        return self._totals

    def _with_own(self) -> dict[Key, Item]:
        while self._batches:
            _add(self._totals, self._batches.pop(0))
        return self._totals


def _add(totals: dict[Key, Item], found: dict[Key, Item]) -> None:
    for key, value in found.items():
        totals[key] = totals[key] + value if key in totals else value


def join_processes() -> Shard:
    """The shard of this process among those that torchrun started; without torchrun, the only shard.

    Raises:
        QVLMError: torchrun's environment variables are set, but the processes cannot connect.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return Shard()
    if not dist.is_initialized():
        try:
            dist.init_process_group("gloo", timeout=_TIMEOUT)
            atexit.register(dist.destroy_process_group)  # without it, processes that end after the first one abort
        except (RuntimeError, ValueError) as error:
            raise QVLMError(f"the {count} processes of the search cannot connect: {one_line(error)}") from error
    return Shard(dist.get_rank(), dist.get_world_size())
