"""Write files and folders that are there completely or not at all, whatever ends the process that writes them.

What is being written has a hidden name beside its final one and is locked by its writer. A process that was killed
leaves it behind, unlocked: the next one that writes the same name removes it.
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
    """Write a file in one step; an older one is replaced, and missing folders are made.

    Raises:
        QVLMError: it cannot be written; what was there before is unchanged.
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
    """Give a file, or a folder and all in it, the permissions of new ones; temporary ones are their owner's alone."""
    mask = os.umask(0o077)
    os.umask(mask)
    for path in (target, *target.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def make_folder(directory: Path) -> None:
    """Make a folder, and those above it, where they are missing.

    Raises:
        QVLMError: it cannot be made.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise QVLMError(f"{str(directory)!r} cannot be written: {one_line(error)}") from error


def require_writable(target: Path) -> None:
    """Check that a file or folder can be written, before the work of which it is the outcome.

    Raises:
        QVLMError: it cannot; the message names the reason.
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
        QVLMError: there is something already, or it cannot.
    """
    require_writable(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise QVLMError(f"{str(directory)!r} exists and is not an empty folder; name a new one")


@contextmanager
def staged(directory: Path, replaces: bool = False) -> Iterator[Path]:
    """A folder to write into, which becomes ``directory`` unless an error is raised.

    Args:
        directory: to write; new or empty.
        replaces: another folder of that name is removed for it.

    Raises:
        QVLMError: it cannot be written; then nothing of it is there.
    """
    with _whole(directory, lambda prefix: tempfile.mkdtemp(_SUFFIX, prefix, directory.parent)) as staging:
        yield staging
        follow_umask(staging)
        if not (replaces and directory.exists()):
            staging.replace(directory)  # takes the place of an empty folder
        else:
            replaced = tempfile.mkdtemp(_SUFFIX, f".{directory.name}.", directory.parent)
            directory.replace(replaced)
            staging.replace(directory)
            shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def _whole(target: Path, make: Callable[[str], str]) -> Iterator[Path]:
    """A locked file or folder that ``make`` puts beside ``target``; gone at the end if it is still there."""
    prefix, staging = f".{target.name}.", None
    try:
        make_folder(target.parent)
        for left in target.parent.glob(f"{escape(prefix)}*{_SUFFIX}"):
            _remove_unlocked(left)
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
        except FileNotFoundError:  # before it was locked, another process took it for a leftover
            continue
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if staging.exists():
            return staging, descriptor
        os.close(descriptor)


def _remove_unlocked(left: Path) -> None:
    try:
        descriptor = os.open(left, os.O_RDONLY)
    except OSError:  # finished meanwhile, or another user's
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove(left)
    except BlockingIOError:
        pass
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
