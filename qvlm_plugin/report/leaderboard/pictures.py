"""Thumbnails of the images that samples name, for the page.

Samples are untrusted: only embedded pictures and files in or below the samples' folder are read, and all are encoded
again.
"""

import base64
import binascii
import io
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


def picture(media: Any, folder: Path) -> str | None:
    """A data URI of the first picture that can be read; None without one.

    Args:
        media: a sample's ``input_media``: file names, data URIs, URLs, or digests.
        folder: the samples file's folder.
    """
    for source in media if isinstance(media, list) else ():
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
            small = image.convert("RGB")
            small.thumbnail((SIDE, SIDE))
            stream = io.BytesIO()
            small.save(stream, "WEBP", quality=70)
            return stream.getvalue()
    except Exception:  # damaged pictures raise all kinds of exceptions
        return None
