"""Where this package keeps what it can make or fetch again."""

import os
from pathlib import Path


def cache_root() -> Path:
    """The cache folder: the environment variable QVLM_CACHE, else ~/.cache/qvlm_plugin. It need not exist yet."""
    return Path(os.environ.get("QVLM_CACHE") or Path.home() / ".cache" / "qvlm_plugin").expanduser()
