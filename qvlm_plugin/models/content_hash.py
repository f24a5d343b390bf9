"""SHA-256 of a checkpoint's files; large files are read once.

The hash of a large local file is kept in the package's cache as long as path, size, inode and times of change stay the
same. As in git's index, a change of content that leaves all of them unchanged is not noticed; but writing to a file
sets its times, and no program can set the time of its inode's last change (ctime). A cache that is damaged or cannot be
written only costs time.
"""

import hashlib
import os
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from qvlm_plugin.atomic import write_file
from qvlm_plugin.cache import cache_root
from qvlm_plugin.errors import QVLMError

LARGE = 2**24
"""Minimum size in bytes of a file whose hash is kept; smaller files are read as quickly as a stored hash."""

SETTLED = 2
"""Seconds since its last change after which a file's hash is kept: clocks of file systems are as coarse as that, and
two changes within one tick look like one (git calls such files racy)."""


def content_hash(file: Path) -> str:
    """SHA-256 of a file's content, hexadecimal; kept for the next call if the file is large and settled."""
    path = file.resolve()
    # In the hub's cache a weight file is a link to a blob that is named by its SHA-256: no need to read gigabytes.
    if re.fullmatch(r"[0-9a-f]{64}", path.name):
        return path.name
    with path.open("rb") as stream:
        state = os.fstat(stream.fileno())
        if state.st_size < LARGE:
            return _read(stream)
        if (kept := _recall(path, state)) is not None:
            return kept
        start = time.time()
        digest = _read(stream)
        changed = _identity(os.fstat(stream.fileno())) != _identity(state)
    if not changed and start - max(state.st_mtime, state.st_ctime) >= SETTLED:
        with suppress(QVLMError, RuntimeError):  # RuntimeError: there is no home folder
            write_file(_entry(path), _sealed(f"{_identity(state)}\n{digest}\n"))
    return digest


def _read(stream: BinaryIO) -> str:
    return hashlib.file_digest(stream, "sha256").hexdigest()


def _recall(path: Path, state: os.stat_result) -> str | None:
    try:
        blob = _entry(path).read_bytes()
    except (OSError, RuntimeError):
        return None
    identity, _, rest = blob.decode("ascii", "replace").partition("\n")
    digest = rest.partition("\n")[0]
    whole = blob == _sealed(f"{identity}\n{digest}\n")
    return digest if whole and identity == _identity(state) else None


def _entry(path: Path) -> Path:
    return cache_root() / "hashes" / hashlib.sha256(os.fsencode(path)).hexdigest()


def _identity(state: os.stat_result) -> str:
    return f"{state.st_size} {state.st_mtime_ns} {state.st_ctime_ns} {state.st_ino}"


def _sealed(text: str) -> bytes:
    """``text`` followed by its hash, which reveals damage."""
    return f"{text}{hashlib.sha256(text.encode()).hexdigest()}\n".encode()
