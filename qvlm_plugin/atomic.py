"""Write files and folders atomically: they appear completely or not at all, even if the writing process is killed.

A file or folder is written under a hidden temporary name in the same folder, locked by its writer, and then renamed. A
killed process leaves an unlocked one behind, which the next writer of the same name removes.
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path

from safetensors import SafetensorError

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.reading import one_line

_SUFFIX = ".partial"


def write_file(file: Path, blob: bytes) -> None:
    """Write a file in one step; an existing file is replaced, and missing folders are created.

    Raises:
        QVLMError: it cannot be written; an existing file is then unchanged.
    """

    def make(prefix: str) -> str:
        descriptor, name = tempfile.mkstemp(_SUFFIX, prefix, file.parent)
        os.close(descriptor)
        return name

    with _whole(file, make) as staging:
        staging.write_bytes(blob)
        follow_umask(staging)
        staging.replace(file)


def follow_umask(target: Path) -> None:
    """Give a temporary file or folder (with its content) the permissions of new ones; `tempfile` restricts them."""
    mask = os.umask(0o077)
    os.umask(mask)
    for path in (target, *target.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def make_folder(directory: Path) -> None:
    """Create a folder and its parents if they are missing.

    Raises:
        QVLMError: it cannot be created.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise QVLMError(f"{str(directory)!r} cannot be written: {one_line(error)}") from error


def require_writable(target: Path) -> None:
    """Check that a file or folder can be written, before the work whose result it will contain.

    Raises:
        QVLMError: it cannot be written; the message names the reason.
    """
    make_folder(target.parent)
    try:
        with tempfile.TemporaryDirectory(_SUFFIX, f".{target.name}.", target.parent):
            pass
    except OSError as error:
        raise QVLMError(f"{str(target)!r} cannot be written: {one_line(error)}") from error


def require_vacant(directory: Path) -> None:
    """Check that a new folder can be written.

    Raises:
        QVLMError: something exists there that is not an empty folder, or the folder cannot be written.
    """
    require_writable(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise QVLMError(f"{str(directory)!r} exists and is not an empty folder; name a new one")


@contextmanager
def staged(directory: Path, replaces: bool = False) -> Iterator[Path]:
    """A folder to write into, which is renamed to ``directory`` unless an error is raised.

    Args:
        directory: the final folder, new or empty.
        replaces: whether to replace an existing folder.

    Raises:
        QVLMError: the folder cannot be written; nothing remains of it.
    """
    with _whole(directory, lambda prefix: tempfile.mkdtemp(_SUFFIX, prefix, directory.parent)) as staging:
        yield staging
        follow_umask(staging)
        if not (replaces and directory.exists()):
            staging.replace(directory)  # also replaces an empty folder
        else:
            replaced = tempfile.mkdtemp(_SUFFIX, f".{directory.name}.", directory.parent)
            directory.replace(replaced)
            staging.replace(directory)
            shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def _whole(target: Path, make: Callable[[str], str]) -> Iterator[Path]:
    """A locked temporary file or folder that ``make`` creates next to ``target``; removed at the end unless renamed."""
    prefix, staging = f".{target.name}.", None
    try:
        make_folder(target.parent)
        for leftover in target.parent.glob(f"{escape(prefix)}*{_SUFFIX}"):
            _remove_unlocked(leftover)
        staging, descriptor = _make_locked(lambda: make(prefix))
        try:
            yield staging
        finally:
            os.close(descriptor)
    except (OSError, SafetensorError) as error:
        raise QVLMError(f"{str(target)!r} cannot be written: {one_line(error)}") from error
    finally:
        if staging is not None:
            _remove(staging)


def _make_locked(make: Callable[[], str]) -> tuple[Path, int]:
    while True:
        staging = Path(make())
        try:
            descriptor = os.open(staging, os.O_RDONLY)
        except FileNotFoundError:  # another process removed it as a leftover before it was locked
            continue
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if staging.exists():
            return staging, descriptor
        os.close(descriptor)


def _remove_unlocked(leftover: Path) -> None:
    try:
        descriptor = os.open(leftover, os.O_RDONLY)
    except OSError:  # renamed meanwhile, or of another user
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove(leftover)
    except BlockingIOError:
        pass
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
