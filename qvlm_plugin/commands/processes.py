"""Start a command in several processes that work together, as torchrun does, and end as one command does."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence


def device_of_process(device: str, count: int) -> str:
    """The device of one of ``count`` processes: of ``cuda``, the GPU of its rank on this machine."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if count > 1 and device == "cuda" else device


def run_together(processes: int, arguments: Sequence[str]) -> int:
    """Run ``qvlm ARGUMENTS`` in so many processes of this machine; the first one speaks for all.

    Returns:
        0, or the exit status of the first process that failed, after which the others are ended.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    common = {"OMP_NUM_THREADS": threads, **os.environ, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    children = []
    for rank in range(processes):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        quiet = None if rank == 0 else subprocess.DEVNULL
        command = [sys.executable, "-m", "qvlm_plugin", *arguments]
        children.append(subprocess.Popen(command, env=common | place, stdout=quiet, stderr=quiet))
    try:
        while True:
            codes = [child.poll() for child in children]
            if failed := [code for code in codes if code]:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    children[0].wait(10)  # it has heard of the failure, and tells it
                return failed[0]
            if all(code == 0 for code in codes):
                return 0
            time.sleep(0.2)
    finally:
        for child in children:
            if child.poll() is None:
                child.terminate()
