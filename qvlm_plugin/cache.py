"""The package's cache folder, texts kept there until files change, and a hash of source code for the keys of entries.

What is computed from files is kept as long as their paths, sizes, inodes and times of change stay the same. As in git's
index, a change of content that leaves all of them unchanged is not noticed; but writing to a file sets its times, and
no program can set the time of its inode's last change (ctime). A cache that is damaged or cannot be written only costs
time.
"""

import hashlib
import os
from contextlib import suppress
from importlib import import_module
from pathlib import Path

from qvlm_plugin.atomic import write_file
from qvlm_plugin.errors import QVLMError

SETTLED = 2
"""Seconds since a file's last change after which what was computed from it is kept: clocks of file systems are as
coarse as that, and two changes within one tick look like one (git calls such files racy)."""


def cache_root() -> Path:
    """The cache folder: the environment variable QVLM_CACHE, else ~/.cache/qvlm_plugin. It need not exist yet."""
    return Path(os.environ.get("QVLM_CACHE") or Path.home() / ".cache" / "qvlm_plugin").expanduser()


def sources_digest(package: str) -> str:
    """SHA-256 over the Python files of a top-level package or module; that of no data if it has no files."""
    module = import_module(package)
    files = [Path(file)] if (file := getattr(module, "__file__", None)) else []
    for folder in getattr(module, "__path__", []):
        files += Path(folder).rglob("*.py")
    digest = hashlib.sha256()
    for path in sorted(set(files)):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def identity_of(state: os.stat_result) -> str:
    """What a change of a file's content changes, on one line."""
    return f"{state.st_size} {state.st_mtime_ns} {state.st_ctime_ns} {state.st_ino}"


def is_settled(state: os.stat_result, now: float) -> bool:
    """Whether a file last changed so long before ``now`` that a later change can be told from that one."""
    return now - max(state.st_mtime, state.st_ctime) >= SETTLED


def keep(kind: str, path: Path, identity: str, text: str) -> None:
    """Keep a text about a file or folder, for `recall`; it replaces an earlier one. The texts have no line feeds."""
    with suppress(QVLMError, RuntimeError):  # RuntimeError: there is no home folder
        write_file(_entry(kind, path), _sealed(identity, text))


def recall(kind: str, path: Path, identity: str) -> str | None:
    """The text that was kept about a file or folder with this identity; None if there is none, or if it is damaged."""
    try:
        blob = _entry(kind, path).read_bytes()
    except (OSError, RuntimeError):
        return None
    text = blob.decode("utf-8", "replace").split("\n")[1:2]
    return text[0] if text and blob == _sealed(identity, text[0]) else None


def _entry(kind: str, path: Path) -> Path:
    return cache_root() / kind / hashlib.sha256(os.fsencode(path)).hexdigest()


def _sealed(identity: str, text: str) -> bytes:
    """Both lines followed by their hash, which reveals damage."""
    lines = f"{identity}\n{text}\n"
    return f"{lines}{hashlib.sha256(lines.encode()).hexdigest()}\n".encode()
