"""Files that are there completely or not at all."""

import os
import tempfile
from pathlib import Path


def write_file(file: Path, blob: bytes) -> None:
    """Write a file in one step; an older one is replaced."""
    descriptor, staging = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(blob)
        os.chmod(staging, 0o644)
        os.replace(staging, file)
    except BaseException:
        os.unlink(staging)
        raise
