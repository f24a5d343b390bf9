"""What a process does while it reads hostile files, told by Python's audit events."""

import site
import sys
import sysconfig
from contextlib import contextmanager
from pathlib import Path

import qvlm_plugin

FORBIDDEN = ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect")
_OURS = [sys.prefix, sys.base_prefix, sysconfig.get_path("stdlib"), *site.getsitepackages(), *sys.path]
_OURS += [str(Path(qvlm_plugin.__file__).parent), "/proc", "/dev", "/sys"]

_watches: list = []  # an audit hook cannot be removed


def _hook(event, args):
    for folder, seen in _watches:
        if event in FORBIDDEN:
            seen.append((event, *map(repr, args)))
        elif event == "open" and isinstance(args[0], str | Path):
            path = Path(args[0]).absolute()
            if not any(path.is_relative_to(ours) for ours in (folder, *filter(None, _OURS))):
                seen.append((event, str(path)))


sys.addaudithook(_hook)


@contextmanager
def watched(folder):
    """Fails where something is unpickled, run or connected to, or a file is opened outside of folder (and of code)."""
    watch = (Path(folder), [])
    _watches.append(watch)
    try:
        yield
    finally:
        _watches.remove(watch)
    assert watch[1] == []
