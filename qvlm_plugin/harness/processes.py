"""The processes of one evaluation, as torchrun or accelerate started them.

Asked of torch.distributed rather than of accelerate, which reports a single process under torchrun on CPU.
"""

import atexit
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import distributed

T = TypeVar("T")


def rank() -> int:
    """This process's number."""
    return distributed.get_rank() if _several() else 0


def count() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if _several() else 1


def gather(value: T) -> list[T]:
    """Every process's value, in order of rank, in every process. All must call it."""
    values = [value] * count()
    if len(values) > 1:
        distributed.all_gather_object(values, value)
    return values


@contextmanager
def first_process_first() -> Iterator[None]:
    """Let the first process finish the block before the others enter it, so that they find what it cached.

    The others also go on when it fails; they then meet the same error themselves.
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
    """Make a failure of one process the end of all; also usable as a decorator.

    lmms-eval catches exceptions and lets the process end as if all were well, while the others wait for it at the next
    barrier. A failing exit code makes torchrun stop them.
    """
    try:
        yield
    except Exception as error:
        if count() == 1:
            raise
        traceback.print_exc()
        raise SystemExit(1) from error


def leave_at_exit() -> None:
    """End this process's part in the group before the interpreter shuts down.

    Nobody else does; a process that still has gloo's threads then may abort, whereupon torchrun stops the others while
    they write the results.
    """
    if count() > 1:
        atexit.register(_leave)


def _leave() -> None:
    if _several():
        distributed.destroy_process_group()


def _several() -> bool:
    return distributed.is_available() and distributed.is_initialized()
