"""Images as a model receives them: upright, in 8-bit RGB, with the same pixels from every source."""

from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from qvlm_plugin.reading import parsed_elsewhere


def open_image(source: Path | bytes) -> Image.Image:
    """The image in a file, or in a file's content; the first frame of an animation.

    Raises:
        QVLMError: it is missing, damaged, truncated, of a kind that `as_rgb` refuses, or has more pixels than Pillow
            considers safe (twice ``PIL.Image.MAX_IMAGE_PIXELS``).
    """
    name = f"image {str(source)!r}" if isinstance(source, Path) else "an image"
    with (
        parsed_elsewhere(f"{name} cannot be read"),
        Image.open(source if isinstance(source, Path) else BytesIO(source)) as image,
    ):
        return as_rgb(image.copy())


def as_rgb(image: Image.Image) -> Image.Image:
    """The image in RGB, turned upright by its EXIF orientation; the same object if nothing changes.

    Pillow's own conversion clips images of more than 8 bits. Here 16-bit grey keeps its upper 8 bits, as 16-bit colour
    does in Pillow; 32-bit integers count as 8-bit grey if none exceeds 255, else as 16-bit grey; floating-point values
    are read as 0 to 1 if none exceeds 1, else as 0 to 255.

    Raises:
        ValueError: pixel values are outside these ranges, or Pillow cannot convert the mode.
    """
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if is_deep(image):
        image = Image.fromarray(_eight_bits(np.asarray(image)))
    return image if image.mode == "RGB" else image.convert("RGB")


def is_deep(image: Image.Image) -> bool:
    """Whether an image has more than 8 bits per channel, which Pillow's own conversion clips."""
    return image.mode == "F" or image.mode.startswith("I")


def _eight_bits(pixels: np.ndarray) -> np.ndarray:
    low, high = float(pixels.min()), float(pixels.max())  # NaN if any pixel is NaN
    if pixels.dtype.itemsize == 2:
        return (pixels >> 8).astype(np.uint8)
    limit = 255 if pixels.dtype.kind == "f" else 65_535
    if not 0 <= low <= high <= limit:
        allowed = "0 to 1 or 0 to 255" if pixels.dtype.kind == "f" else f"0 to {limit:,}"
        raise ValueError(f"an image has pixels from {low:g} to {high:g}; allowed are {allowed}")
    if pixels.dtype.kind == "f":
        return (pixels * (255 if high <= 1 else 1)).round().astype(np.uint8)
    return (pixels >> (8 if high > 255 else 0)).astype(np.uint8)
