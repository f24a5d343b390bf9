"""Start a command in several cooperating processes, as torchrun does, with one output and one exit status."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence


def device_of_process(device: str, count: int) -> str:
    """The device of one of ``count`` processes: for ``cuda``, the GPU with its local rank."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if count > 1 and device == "cuda" else device


def run_together(processes: int, arguments: Sequence[str]) -> int:
    """Run ``qvlm ARGUMENTS`` in several processes on this machine; only the first one prints.

    Returns:
        0, or the exit status of the first process that failed, after which the others are terminated.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    common = {"OMP_NUM_THREADS": threads, **os.environ, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    children = []
    for rank in range(processes):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        output = None if rank == 0 else subprocess.DEVNULL
        command = [sys.executable, "-m", "qvlm_plugin", *arguments]
        children.append(subprocess.Popen(command, env=common | own, stdout=output, stderr=output))
    try:
        while True:
            codes = [child.poll() for child in children]
            if failed := [code for code in codes if code]:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    children[0].wait(10)  # the first process also gets the failure, and prints it
                return failed[0]
            if all(code == 0 for code in codes):
                return 0
            time.sleep(0.2)
    finally:
        for child in children:
            if child.poll() is None:
                child.terminate()
