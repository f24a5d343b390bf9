"""The index of lmms-eval's own tasks, kept from one process to the next.

lmms-eval parses its 2,000 YAML files in every process before it starts, for five to twelve seconds. Its warnings about
them appear only in the process that does so.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from qvlm_plugin.cache import identity_of, is_settled, keep, recall

_KIND = "tasks"


def kept_index(folder: Path, parser: Path, read: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The index of a folder of tasks: the one that was kept, or else what ``read`` returns.

    It is kept until the parser changes, or a file in the folder is added, removed or changed. An index is not kept if
    JSON cannot represent it, or if lmms-eval may have included files of the working directory, where it looks first.

    Args:
        folder: the folder.
        parser: the file with the code that parses tasks.
        read: indexes the folder, in seconds.
    """
    start, states = time.time(), _states(folder, parser)
    identity = _identity(states)
    if (kept := recall(_KIND, folder, identity)) is not None:
        return json.loads(kept)
    index = dict(read())
    settled = all(is_settled(state, start) for state in states.values())
    unchanged = settled and _identity(_states(folder, parser)) == identity
    if unchanged and not _shadowed(states) and (text := _as_json(index)) is not None:
        keep(_KIND, folder, identity, text)
    return index


def _states(folder: Path, parser: Path) -> dict[str, os.stat_result]:
    """The parser and the files below the folder, without those that Python makes itself."""
    states = {}
    for file in (str(parser), *_files(folder)):
        with suppress(OSError):  # a link to nothing
            states[file] = os.stat(file)
    return states


def _files(folder: Path) -> Iterator[str]:
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name != "__pycache__"]
        yield from (os.path.join(root, name) for name in files)


def _identity(states: dict[str, os.stat_result]) -> str:
    lines = sorted(f"{file} {identity_of(state)}" for file, state in states.items())
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def _shadowed(states: dict[str, os.stat_result]) -> bool:
    """Whether the working directory, or the one above it, has a file with the name of one that tasks may include."""
    names = {Path(file).name for file in states if Path(file).suffix in ("", ".yaml")}
    return any(Path(folder, name).is_file() for folder in (".", "..") for name in names)


def _as_json(index: dict[str, Any]) -> str | None:
    try:
        text = json.dumps(index)
    except (TypeError, ValueError):
        return None
    return text if json.loads(text) == index else None
