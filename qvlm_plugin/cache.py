"""The package's cache folder, and a hash of source code for the keys of its entries."""

import hashlib
import os
from importlib import import_module
from pathlib import Path


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
