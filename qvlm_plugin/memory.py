"""How much memory the process has held at most, and what it keeps of memory that is free."""

import platform
import resource
from contextlib import suppress
from pathlib import Path

import psutil
import torch


def peak_memory(on_gpu: bool) -> int:
    """Bytes held at most since the process began, or since `restart_peak`: on all GPUs, or by the process."""
    if on_gpu:
        return sum(torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count()))
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def restart_peak() -> None:
    """Let `peak_memory` count from now on; a process's own peak restarts on Linux only."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        for index in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(index)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def trim_heap() -> None:
    """Give freed memory back to the system.

    The C library keeps freed blocks of up to some megabytes for later use, and packed tensors that come to lie between
    them keep it from using them for larger ones: a model that is quantized tensor by tensor would take almost twice the
    memory of its weights. Takes well below a millisecond when there is nothing to give back.
    """
    if hasattr(psutil, "heap_trim"):  # not with every C library
        psutil.heap_trim()
