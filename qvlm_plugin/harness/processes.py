"""The processes of one evaluation, started by torchrun or accelerate.

Uses torch.distributed, because accelerate reports a single process under torchrun on CPU.
"""

import atexit
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import distributed

T = TypeVar("T")


def rank() -> int:
    """This process's rank."""
    return distributed.get_rank() if _is_distributed() else 0


def count() -> int:
    """Number of processes."""
    return distributed.get_world_size() if _is_distributed() else 1


def gather(value: T) -> list[T]:
    """The values of all processes in order of rank. Every process must call it."""
    values = [value] * count()
    if len(values) > 1:
        distributed.all_gather_object(values, value)
    return values


@contextmanager
def first_process_first() -> Iterator[None]:
    """Run the body in the first process before the others, so that they find what it cached.

    If it fails, the other processes continue and get the same error.
    """
    if rank() > 0:
        distributed.barrier()
    try:
        yield
    finally:
        if rank() == 0 and count() > 1:
            distributed.barrier()


@contextmanager
def failing_together() -> Iterator[None]:
    """Stop all processes if one fails; also usable as a decorator.

    lmms-eval catches exceptions and exits with 0, while the other processes wait at the next barrier. A nonzero exit
    code makes torchrun stop them.
    """
    try:
        yield
    except Exception as error:
        if count() == 1:
            raise
        traceback.print_exc()
        raise SystemExit(1) from error


def leave_at_exit() -> None:
    """Leave the process group before the interpreter shuts down.

    Otherwise gloo's threads may abort the process, and torchrun then stops the others while they write the results.
    """
    if count() > 1:
        atexit.register(_leave)


def _leave() -> None:
    if _is_distributed():
        distributed.destroy_process_group()


def _is_distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized()
