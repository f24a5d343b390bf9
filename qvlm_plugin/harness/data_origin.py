"""The origin of a task's documents: a commit of a hub data set, or a hash of local files."""

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def data_origin(config: Mapping[str, Any], splits: Mapping[str, Any]) -> dict[str, Any]:
    """The source of a task's documents.

    Args:
        config: the task's configuration, as in the results' ``configs``.
        splits: the task's data set as loaded, by split.

    Returns:
        ``dataset``, ``config``, ``split``; ``origin``: ``hub`` with a ``revision``, or ``local`` with a
        ``content_hash``; ``stand_in``: whether the local folder has a file stand_in.json, which marks stand-in data.
    """
    dataset, split = str(config.get("dataset_path")), config.get("test_split") or config.get("validation_split")
    origin = {"dataset": dataset, "config": config.get("dataset_name"), "split": split}
    if files := _local_files(dataset, config.get("dataset_kwargs") or {}):
        stand_in = (Path(dataset) / "stand_in.json").is_file()
        return origin | {"origin": "local", "content_hash": content_hash(files), "stand_in": stand_in}
    return origin | {"origin": "hub", "revision": hub_revision(splits.get(split)), "stand_in": False}


def _local_files(dataset: str, options: Mapping[str, Any]) -> list[Path]:
    """The files of a local data set, in its folder or listed in its options; none for a hub data set."""
    if Path(dataset).is_dir():
        return sorted(path for path in Path(dataset).rglob("*") if path.is_file())
    listed = options.get("data_files") or ()
    groups = listed.values() if isinstance(listed, Mapping) else [listed]
    names = [name for group in groups for name in ([group] if isinstance(group, str) else group)]
    return sorted(path for name in names if (path := Path(name)).is_file())


def content_hash(files: Iterable[Path]) -> str:
    """SHA-256 over the files' names and contents, in the order given."""
    sha = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            sha.update(f"{file.name}\0".encode())
            sha.update(hashlib.file_digest(stream, "sha256").digest())
    return sha.hexdigest()


def hub_revision(split: Any) -> str | None:
    """The commit of a hub data set, after which ``datasets`` names its cache folder; None if unknown."""
    folders = (Path(file["filename"]).parent.name for file in getattr(split, "cache_files", ()))
    return next((name for name in folders if re.fullmatch(r"[0-9a-f]{40}", name)), None)
