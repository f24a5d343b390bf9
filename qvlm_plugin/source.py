"""The commit of the package's running source."""

import json
import subprocess
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path


def source_commit(root: Path = Path(__file__).parents[1], package: str = "qvlm_plugin") -> str | None:
    """The commit of the running source, with the suffix ``-dirty`` if files differ from it; None if unknown.

    It is known for a git checkout, and for an installation by pip from a git address.

    Args:
        root: parent of the package's folder.
        package: name of the installed distribution.
    """
    if (root / ".git").exists():
        words = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
        try:
            return subprocess.run(words, capture_output=True, check=True, text=True, timeout=30).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return None
    try:
        origin = distribution(package).read_text("direct_url.json")
    except PackageNotFoundError:
        return None
    return json.loads(origin).get("vcs_info", {}).get("commit_id") if origin else None
