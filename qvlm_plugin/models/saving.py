"""Checkpoint folders that are there completely or not at all."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qvlm_plugin.errors import QVLMError


def require_vacant(directory: Path) -> None:
    """Check that a folder can be written.

    Raises:
        QVLMError: there is something already.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise QVLMError(f"{str(directory)!r} exists and is not an empty folder; name a new one")


@contextmanager
def staged(directory: Path) -> Iterator[Path]:
    """A folder to write into, which becomes ``directory``, new or empty, unless an error is raised."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}."))
    try:
        yield staging
        staging.chmod(0o755)
        if directory.exists():
            directory.rmdir()
        staging.replace(directory)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
