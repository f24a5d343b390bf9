"""SHA-256 of a checkpoint's files; that of a large local file is kept in the package's cache until the file changes."""

import hashlib
import os
import re
import time
from pathlib import Path
from typing import BinaryIO

from qvlm_plugin.cache import identity_of, is_settled, keep, recall

LARGE = 2**24
"""Minimum size in bytes of a file whose hash is kept; smaller files are read as quickly as a stored hash."""


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
        identity = identity_of(state)
        if (kept := recall("hashes", path, identity)) is not None:
            return kept
        start = time.time()
        digest = _read(stream)
        unchanged = identity_of(os.fstat(stream.fileno())) == identity
    if unchanged and is_settled(state, start):
        keep("hashes", path, identity, digest)
    return digest


def _read(stream: BinaryIO) -> str:
    return hashlib.file_digest(stream, "sha256").hexdigest()
