"""The same pixels from whichever source; what cannot be shown right is an error in one line."""

import io

import numpy as np
import pytest
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import ExifTags, Image
from tiny_llava import random_image

from qvlm_plugin.conversation import Conversation
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.harness.host import require_whole_images
from qvlm_plugin.harness.requests import from_messages, from_visuals, with_shallow_images
from qvlm_plugin.images import as_rgb, open_image

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


def phone_photo(orientation):
    """A JPEG that was taken with the telephone held like this."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    stream = io.BytesIO()
    random_image(1, 40).crop((0, 0, 40, 24)).save(stream, "JPEG", exif=exif)
    return "photo.jpg", stream.getvalue()


def saved(name, image):
    stream = io.BytesIO()
    image.save(stream, {"png": "PNG", "tif": "TIFF", "gif": "GIF", "jpg": "JPEG"}[name.rpartition(".")[2]])
    return name, stream.getvalue()


PICTURES = {
    "turned": phone_photo(6),
    "mirrored": phone_photo(2),
    "16 bits": saved("deep.png", Image.fromarray(RAMP.astype(np.uint16) * 257)),
    "float": saved("float.tif", Image.fromarray(RAMP.astype(np.float32) / 255)),
    "float to 255": saved("float255.tif", Image.fromarray(RAMP.astype(np.float32))),
    "32 bits": saved("whole.tif", Image.fromarray(RAMP.astype(np.int32) * 257)),
    "palette": saved("palette.gif", random_image(3).convert("P")),
    "transparent": saved("alpha.png", random_image(4).convert("RGBA")),
    "cmyk": saved("cmyk.jpg", random_image(5).convert("CMYK")),
    "grey": saved("grey.png", Image.fromarray(RAMP)),
}


def decoded_by_datasets(content):
    """As a task's document has it."""
    rows = Dataset.from_list(
        [{"image": {"bytes": content, "path": None}, "text": "what?"}],
        features=Features({"image": ImageFeature(), "text": Value("string")}),
    )
    return with_shallow_images(rows[0])["image"]


@pytest.mark.parametrize("kind", PICTURES)
def test_the_digest_is_the_same_however_the_picture_arrives(kind, tmp_path):
    name, content = PICTURES[kind]
    file = tmp_path / name
    file.write_bytes(content)
    message = {"role": "user", "content": [{"type": "image", "url": str(file)}, {"type": "text", "text": "what?"}]}
    ways = [
        Conversation.from_prompt("<image>\nwhat?", [open_image(file)]),  # a calibration file
        from_visuals("what?", [str(file)]),
        from_visuals("what?", [file]),
        from_messages([message]),
        from_visuals("what?", [{"bytes": content, "path": None}]),
        from_visuals("what?", [Image.open(file)]),
        from_visuals("what?", [decoded_by_datasets(content)]),
        from_visuals("what?", [decoded_by_datasets(content).convert("RGB")]),  # as most tasks do
    ]
    assert len({way.digest() for way in ways}) == len({way.image_digest() for way in ways}) == 1


@pytest.mark.parametrize("kind", ["16 bits", "float", "float to 255", "32 bits", "grey"])
def test_grey_keeps_its_brightness(kind):
    pixels = np.asarray(open_image(PICTURES[kind][1]))
    assert (pixels == RAMP[..., None]).all()


def test_a_photo_is_upright():
    turned, mirrored = (open_image(PICTURES[kind][1]) for kind in ("turned", "mirrored"))
    plain = open_image(phone_photo(1)[1])
    assert turned.tobytes() == plain.transpose(Image.Transpose.ROTATE_270).tobytes()
    assert mirrored.tobytes() == plain.transpose(Image.Transpose.FLIP_LEFT_RIGHT).tobytes()
    assert as_rgb(turned) is turned


@pytest.mark.parametrize("pixels", [[-1.0, 0.5], [0.0, 3000.0], [np.nan, 0.5]])
def test_numbers_of_no_known_range_are_refused(pixels):
    with pytest.raises(ValueError, match="allowed are 0 to 1 or 0 to 255"):
        as_rgb(Image.fromarray(np.array([pixels], dtype=np.float32)))
    with pytest.raises(ValueError, match="from 0 to 70000; allowed are 0 to 65,535"):
        as_rgb(Image.fromarray(np.array([[0, 70_000]], dtype=np.int32)))


def test_what_cannot_be_read_is_named_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000)
    require_whole_images()  # lmms-eval, imported above, has Pillow fill them up
    photo = phone_photo(1)[1]
    contents = {
        "huge.png": saved("huge.png", Image.new("RGB", (100, 100)))[1],
        "cut.jpg": photo[:-100],
        "cut.png": saved("cut.png", random_image(0))[1][:900],
        "none.png": b"",
        "text.png": b"no picture",
        "float.tif": saved("float.tif", Image.fromarray(np.full((2, 2), 9_000, dtype=np.float32)))[1],
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    for name in (*contents, "absent.png"):
        with pytest.raises(QVLMError) as caught:
            open_image(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(OSError, match=r"(?i)truncated"):  # Request.conversation names the document
        decoded_by_datasets(contents["cut.jpg"])
