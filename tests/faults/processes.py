"""Processes to be killed or starved: forked from one that has imported everything, so that each costs little."""

import ctypes
import multiprocessing
import os
import resource
import signal
import sys
from pathlib import Path

CHANGES = {
    "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "tempfile.mkstemp", "tempfile.mkdtemp",
    "shutil.rmtree",
}  # fmt: skip
"""Audit events of changes to a file system, beside opening a file to write it."""

WARM = ["torch", "transformers.models.llava.modeling_llava", "qvlm_plugin.export", "qvlm_plugin.report.compare.report"]
"""What the parent of all imports."""


def start(function, *arguments, limits=()):
    """Run ``function(*arguments)`` in a process of its own, a leader of its group.

    Args:
        function: of an importable module.
        limits: functions that are called first, each with its arguments after it.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(WARM)
    process = context.Process(target=_run, args=(function, arguments, limits))
    process.start()
    return process


def finish(process):
    """Wait for a process; its exit code."""
    process.join(120)
    assert process.exitcode is not None, "hangs"
    return process.exitcode


def _run(function, arguments, limits):
    os.setsid()
    for limit, *values in limits:
        limit(*values)
    function(*arguments)


def dying_at(number, folder, count=None):
    """Kill this process, as kill -9 does, before its ``number``-th change of files in ``folder``.

    ``count`` is a file that gets a byte for every change.
    """
    seen = 0
    counted = None if count is None else os.open(count, os.O_WRONLY | os.O_CREAT)

    def hook(event, args):
        nonlocal seen
        if event == "open":
            changes = isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        else:
            changes = event in CHANGES
        if changes and isinstance(args[0], str | Path) and f"{args[0]}/".startswith(f"{folder}/"):
            seen += 1
            if counted is not None:
                os.write(counted, b".")
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def with_files_of_at_most(size):
    """Let no file grow beyond ``size`` bytes, unless that is -1: writing then fails, as on a full disk."""
    with open(os.devnull, "w") as nothing:  # what is printed may go to a file
        for stream in (1, 2):
            os.dup2(nothing.fileno(), stream)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def without_privileges():
    """Let permissions hold for root too."""
    if os.geteuid() == 0:
        header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # capset(2), version 3, this process
        nothing = (ctypes.c_uint32 * 6)()
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.capset(header, nothing) == 0, os.strerror(ctypes.get_errno())
