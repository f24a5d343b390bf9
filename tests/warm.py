"""Commands in processes of their own that start at once: forked from one process that has imported the packages.

A process of lmms-eval imports for ten seconds and more before it does anything. Here the programs `lmms-eval`, `qvlm`
and `python` (with `-m`, `-c` or a script) are short scripts that ask a server for a fork of itself. The fork gets the
caller's arguments, folder, environment and streams, runs the command as `__main__`, and hands its exit status back.
Everything but the imports is what a process of its own would do. Killing the script does not kill the fork: tests of
kills need real processes.
"""

import atexit
import contextlib
import fcntl
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

IMPORTED = (
    "torch", "transformers", "datasets", "accelerate", "matplotlib.pyplot", "lmms_eval.__main__",
    "lmms_eval.cli.dispatch", "lmms_eval.evaluator", "lmms_eval.tasks", "qvlm_plugin.cli",
    "qvlm_plugin.harness.wrapper", "qvlm_plugin.report.ablations.figure2", "qvlm_plugin.report.compare.report",
    "qvlm_plugin.export", "torch.distributed.run", "transformers.models.llava.modeling_llava",
)  # fmt: skip

SCRIPT = """\
#!{python} -ISE
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    request = {{"program": {program!r}, "arguments": sys.argv[1:], "cwd": os.getcwd(), "environment": dict(os.environ)}}
    socket.send_fds(server, [(json.dumps(request) + "\\n").encode()], [0, 1, 2])
    status = server.recv(16)
os._exit(int(status or 1))
"""


@contextmanager
def programs(folder: Path) -> Iterator[Path]:
    """While active, the programs in this folder start at once.

    Processes that name the same folder share the server; it ends after the last of them.
    """
    folder.mkdir(exist_ok=True)
    with (folder / "users").open("w") as users, (folder / "starting").open("w") as starting:
        fcntl.flock(users, fcntl.LOCK_SH)
        fcntl.flock(starting, fcntl.LOCK_EX)
        if not (folder / "server").exists():
            _start(folder)
        fcntl.flock(starting, fcntl.LOCK_UN)
        yield folder


def _start(folder: Path) -> None:
    address = str(folder / "server")
    for program in ("python", "lmms-eval", "qvlm"):
        script = folder / program
        script.write_text(SCRIPT.format(python=sys.executable, address=address, program=program))
        script.chmod(0o755)
    environment = os.environ | {"HF_DATASETS_CACHE": str(folder / "datasets")}  # read when datasets is imported
    server = subprocess.Popen([sys.executable, __file__, address], env=environment, stdout=subprocess.PIPE)
    assert server.stdout.readline() == b"ready\n"


def _serve(address: Path) -> None:
    for name in IMPORTED:
        import_module(name)
    sys.modules["lmms_eval.tasks"].TaskManager("ERROR")  # the index of its tasks is remembered
    gc.freeze()  # a fork's collections need not visit what is imported
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no child is waited for
    with socket.socket(socket.AF_UNIX) as listening, (address.parent / "users").open() as users:
        listening.bind(str(address))
        listening.listen()
        listening.settimeout(1)
        print("ready", flush=True)
        while True:
            try:
                connection, _ = listening.accept()
            except TimeoutError:
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    address.unlink()
                    return  # nobody uses it any more
                continue
            if os.fork() == 0:
                listening.close()
                users.close()
                _answer(connection, address.parent)
            connection.close()


def _answer(connection: socket.socket, folder: Path) -> None:
    """Run the command that is asked for, and end this process."""
    message, descriptors, _, _ = socket.recv_fds(connection, 1 << 20, 3)
    while not message.endswith(b"\n"):
        message += connection.recv(1 << 20)
    request = json.loads(message)
    for standard, descriptor in enumerate(descriptors):
        os.dup2(descriptor, standard)
        os.close(descriptor)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.path[:1] = [request["cwd"], *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    sys.executable = str(folder / "python")  # processes that it starts are as quick
    status = _run(request["program"], request["arguments"])
    connection.sendall(str(status).encode())
    os._exit(status)


def _run(program: str, arguments: Sequence[str]) -> int:
    try:
        match program, *arguments:
            case "qvlm", *rest:
                sys.argv = ["qvlm", *rest]
                sys.modules["qvlm_plugin.cli"].app()
            case "lmms-eval", *rest:
                _run_module("lmms_eval", rest)
            case ("python", "-m", module, *rest) | ("python", "-u", "-m", module, *rest):
                _run_module(module, rest)
            case "python", "-c", code, *rest:
                sys.argv = ["-c", *rest]
                exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
            case "python", script, *rest if script.endswith(".py"):
                sys.argv, sys.path[0] = [script, *rest], str(Path(script).parent)
                runpy.run_path(script, run_name="__main__")
            case _:
                raise ValueError(f"{program} {' '.join(arguments)} is not known here")
    except SystemExit as exit:
        if isinstance(exit.code, str):
            print(exit.code, file=sys.stderr)
        return exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def _run_module(module: str, arguments: Sequence[str]) -> None:
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
