"""Thumbnails of the images that samples name, for the page.

Samples are untrusted: only embedded pictures and files in or below the samples' folder are read, and all are encoded
again.
"""

import base64
import binascii
import io
import re
import warnings
from pathlib import Path
from typing import Any

from PIL import Image

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.reading import inside

SIDE = 224
"""Pixels of the longer side."""

LIMIT = 20_000_000
"""Maximum bytes, and maximum pixels, of a picture that is read."""


_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")


def recorded_digest(media: Any) -> str | None:
    """The digest of a document's images in a sample's ``input_media``; None if it has none."""
    found = _DIGEST.fullmatch(media[0]) if isinstance(media, list) and media and isinstance(media[0], str) else None
    return found and found[1]


def thumbnail_file(folder: Path, digest: str) -> Path:
    """The path of a thumbnail that `qvlm leaderboard thumbnails` writes.

    Args:
        folder: the samples file's folder.
        digest: digest of the document's images.
    """
    return folder / "thumbnails" / f"{digest}.webp"


def picture(media: Any, folder: Path) -> str | None:
    """A data URI of the first picture that can be read; None without one.

    Args:
        media: a sample's ``input_media``: file names, data URIs, URLs, or a digest, whose `thumbnail_file` is read.
        folder: the samples file's folder.
    """
    digest = recorded_digest(media)
    sources = [str(thumbnail_file(Path(), digest))] if digest else media if isinstance(media, list) else ()
    for source in sources:
        blob = _blob(source, folder)
        if blob and (small := _small(blob)):
            return f"data:image/webp;base64,{base64.b64encode(small).decode()}"
    return None


def _blob(source: Any, folder: Path) -> bytes | None:
    if not isinstance(source, str) or source.startswith(("sha256:", "http:", "https:")):
        return None
    if source.startswith("data:"):
        head, _, body = source.partition(",")
        try:
            return base64.b64decode(body, validate=True) if head.endswith(";base64") and len(body) < LIMIT else None
        except binascii.Error:
            return None
    try:
        file = inside(folder, source, "input_media").resolve()
        allowed = file.is_relative_to(folder.resolve()) and file.is_file() and file.stat().st_size < LIMIT
        return file.read_bytes() if allowed else None
    except (QVLMError, OSError, ValueError):
        return None


def _small(blob: bytes) -> bytes | None:
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(blob), formats=("PNG", "JPEG", "WEBP")) as image:
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if image.width * image.height > LIMIT:
                return None
            image.draft("RGB", (2 * SIDE, 2 * SIDE))
            return thumbnail(image)
    except Exception:  # damaged pictures raise all kinds of exceptions
        return None


def thumbnail(image: Image.Image) -> bytes:
    """A small copy of an image as a WebP file."""
    small = image.convert("RGB")
    small.thumbnail((SIDE, SIDE))
    stream = io.BytesIO()
    small.save(stream, "WEBP", quality=70)
    return stream.getvalue()
