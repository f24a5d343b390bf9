"""Peak memory of the process, and returning freed memory to the system."""

import platform
import re
import resource
from contextlib import suppress
from pathlib import Path

import psutil
import torch

_STATUS = Path("/proc/self/status")


def peak_memory(on_gpu: bool) -> int:
    """Peak memory in bytes, summed over all GPUs or of this process, since its start or `restart_peak`."""
    if on_gpu:
        return sum(torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count()))
    if _STATUS.exists():  # on Linux `getrusage` also counts the process that started this one
        return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", _STATUS.read_text())[1])
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def restart_peak() -> None:
    """Make `peak_memory` count from now on; for the process, this works only on Linux."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        for index in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(index)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def trim_heap() -> None:
    """Return freed memory to the system.

    The C library keeps freed blocks of up to some megabytes for reuse. When a model is quantized tensor by tensor,
    packed tensors allocated between them fragment this memory, so that larger blocks cannot reuse it, and the process
    takes almost twice the memory of the weights. Takes well below a millisecond when there is nothing to return.
    """
    if hasattr(psutil, "heap_trim"):  # not with every C library
        psutil.heap_trim()
