"""The index of lmms-eval's own tasks, kept from one process to the next.

lmms-eval parses its 2,000 YAML files in every process before it starts, for five to twelve seconds.
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


def kept_index(folder: Path, read: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The index of a folder of tasks: the one that was kept, or else what ``read`` returns.

    It is kept until a file in the folder is added, removed or changed. An index that JSON cannot represent is not kept.

    Args:
        folder: the folder, with all that its tasks include.
        read: indexes the folder, in seconds.
    """
    start, states = time.time(), dict(_states(folder))
    identity = _identity(states)
    if (kept := recall(_KIND, folder, identity)) is not None:
        return json.loads(kept)
    index = dict(read())
    settled = all(is_settled(state, start) for state in states.values())
    if settled and _identity(dict(_states(folder))) == identity and (text := _as_json(index)):
        keep(_KIND, folder, identity, text)
    return index


def _states(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    """The files below the folder that Python does not make itself."""
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name != "__pycache__"]
        for name in files:
            file = os.path.join(root, name)
            with suppress(OSError):  # a link to nothing
                yield file, os.stat(file)


def _identity(states: dict[str, os.stat_result]) -> str:
    lines = sorted(f"{file} {identity_of(state)}" for file, state in states.items())
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def _as_json(index: dict[str, Any]) -> str | None:
    try:
        text = json.dumps(index)
    except (TypeError, ValueError):
        return None
    return text if json.loads(text) == index else None
