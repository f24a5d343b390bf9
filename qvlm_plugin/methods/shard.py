"""Several processes search together: each runs its share of the batches, and what they find is put together in order.

Sums are taken in the order of the batches, as one process takes them, so that every process holds the same draft, to
the bit, and makes the same choices.
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

_PATIENCE = timedelta(days=7)
"""How long a process waits for the others: while one of them trains the vision tower, for example."""


class _PeerError(QVLMError):
    """Another process failed."""


class _PeerOutOfMemoryError(torch.OutOfMemoryError):
    """Another process ran out of memory."""


@dataclass(frozen=True)
class Shard:
    """The share of one process.

    All processes must call `gathered`, `one`, `first` and `together` in the same order.

    Attributes:
        rank, count: which process of how many this is.
    """

    rank: int = 0
    count: int = 1

    def own(self, items: Sequence[Item]) -> Sequence[Item]:
        """This process's part of what all share; the parts follow one another."""
        return items[len(items) * self.rank // self.count : len(items) * (self.rank + 1) // self.count]

    def gathered(self, part: Sequence[Item]) -> list[Item]:
        """The parts of all processes, in order; tensors come to the CPU, unless there is one process.

        Raises:
            QVLMError, torch.OutOfMemoryError: another process failed instead.
        """
        if self.count == 1:
            return list(part)
        return [item for _, others in self._exchange("part", send_to_device(list(part), "cpu")) for item in others]

    def one(self, rank: int, run: Callable[[], Item]) -> Item:
        """Let one process call ``run``; all get its result. Its tensors come to the CPU, unless there is one process.

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
        """Let the first process call ``run``; all get its result."""
        return self.one(0, run)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Work that fails in all processes if it fails in one.

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
                self._exchange("failed", (memory, f"process {self.rank}: {one_line(error)}"), heed=False)
            raise

    def _exchange(self, kind: str, content: Any, heed: bool = True) -> list[tuple[str, Any]]:
        answers: list[Any] = [None] * self.count
        dist.all_gather_object(answers, (kind, content))
        for answer, said in answers if heed else ():
            if answer == "failed":
                memory, message = said
                raise (_PeerOutOfMemoryError if memory else _PeerError)(message)
        return answers


class OrderedSum(Generic[Key, Item]):
    """Sums by key over the batches of all processes, in the order of the batches.

    One process adds as it goes. Of several, each keeps its own batches, on the CPU, until those before it have added
    theirs: the sum of a few matrices [K, K] is what goes from one to the next.

    Attributes:
        shard: of this process.
    """

    def __init__(self, shard: Shard) -> None:
        """Begin with nothing."""
        self.shard = shard
        self._totals: dict[Key, Item] = {}
        self._batches: list[dict[Key, Item]] = []

    def add(self, found: dict[Key, Item]) -> None:
        """Add what was found in this process's next batch: values that can be added with ``+``."""
        if self.shard.count == 1:
            _add(self._totals, found)
        else:
            self._batches.append(send_to_device(dict(found), "cpu"))

    def total(self) -> dict[Key, Item]:
        """Return the sums, in all processes; keys in the order in which they came."""
        for rank in range(self.shard.count):
            self._totals = self.shard.one(rank, self._with_own)
        return self._totals

    def _with_own(self) -> dict[Key, Item]:
        while self._batches:
            _add(self._totals, self._batches.pop(0))
        return self._totals


def _add(totals: dict[Key, Item], found: dict[Key, Item]) -> None:
    for key, value in found.items():
        totals[key] = totals[key] + value if key in totals else value


def join_processes() -> Shard:
    """The shard of this process among those that torchrun started; the whole where it did not.

    Raises:
        QVLMError: torchrun's variables are there, and the processes do not find each other.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return Shard()
    if not dist.is_initialized():
        try:
            dist.init_process_group("gloo", timeout=_PATIENCE)
            atexit.register(dist.destroy_process_group)  # or a process that ends after the first one aborts
        except (RuntimeError, ValueError) as error:
            raise QVLMError(f"the {count} processes of the search do not find each other: {one_line(error)}") from error
    return Shard(dist.get_rank(), dist.get_world_size())
