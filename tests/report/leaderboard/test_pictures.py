import base64
import io

import pytest
from PIL import Image, ImageFile

from qvlm_plugin.report.leaderboard.pictures import SIDE, picture


def blob(kind="PNG", size=(400, 300), colour="red"):
    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, kind)
    return stream.getvalue()


def uri(content):
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def shown(found):
    head, _, body = found.partition(",")
    assert head == "data:image/webp;base64"
    return Image.open(io.BytesIO(base64.b64decode(body)))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_pictures_in_files_and_in_samples_become_thumbnails(tmp_path, kind):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.png").write_bytes(blob(kind))
    for source in ("images/1.png", uri(blob(kind))):
        image = shown(picture([source], tmp_path))
        assert image.size == (SIDE, SIDE * 3 // 4) and image.convert("RGB").getpixel((9, 9))[0] > 200


def test_the_first_that_can_be_shown(tmp_path):
    assert shown(picture(["sha256:00", "https://x/1.png", "gone.png", uri(blob())], tmp_path)).width == SIDE


def test_nothing_outside_the_folder_is_read(tmp_path):
    (tmp_path / "secret.png").write_bytes(blob())
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    for source in ("../secret.png", str(tmp_path / "secret.png"), f"file://{tmp_path}/secret.png", "link.png"):
        assert picture([source], folder) is None


@pytest.mark.parametrize(
    "media",
    [None, [], "images/1.png", [7], ["data:image/png;base64,%%"], [uri(b"not a picture")], [uri(blob()[:60])],
     ["data:image/svg+xml;base64,PHN2Zy8+"], [uri(blob(size=(6000, 6000)))], ["."], ["\0"], ["x" * 9999]],
)  # fmt: skip
def test_invalid_pictures_are_none(tmp_path, media, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)  # lmms-eval sets it for the whole process
    assert picture(media, tmp_path) is None
