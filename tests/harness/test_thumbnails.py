import base64
import io
import json

import pytest
from harness.mirrors import SETS, scienceqa_row, write_mirrors
from PIL import Image
from typer.testing import CliRunner

from qvlm_plugin.cli import app
from qvlm_plugin.conversation import Conversation
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.harness.thumbnails import write_thumbnails
from qvlm_plugin.report.leaderboard.pictures import picture

ROWS = [scienceqa_row(number) for number in SETS["ScienceQA"][2]["test"]]


@pytest.fixture(scope="module")
def mirrors(tmp_path_factory):
    return write_mirrors(tmp_path_factory.mktemp("mirrors"))


def write_run(folder, images, qvlm=True):
    """A run on the test split of ScienceQA whose samples record these images."""
    digests = [None if image is None else Conversation.from_prompt("", [image]).image_digest() for image in images]
    media = [[f"sha256:{digest}"] if digest else [] for digest in digests]
    samples = [{"doc_id": index, "input_media": one} for index, one in enumerate(media)]
    content = {
        "results": {"scienceqa": {"exact_match,none": 1.0}},
        "n-samples": {"scienceqa": {"original": len(images), "effective": len(images)}},
    }
    content |= {"qvlm": {"method": "rtn", "scheme": "w4a4", "prompt_format": "chat"}} if qvlm else {}
    folder.mkdir()
    (folder / "r_results.json").write_text(json.dumps(content))
    (folder / "r_samples_scienceqa.jsonl").write_text("".join(json.dumps(one) + "\n" for one in samples))
    return folder / "r_results.json", media


def test_a_run_gets_thumbnails_that_the_page_shows(mirrors, tmp_path):
    images = [row["image"] for row in ROWS]
    results, media = write_run(tmp_path / "run", images)
    assert picture(media[images.index(next(filter(None, images)))], results.parent) is None
    done = CliRunner().invoke(app, ["leaderboard", "thumbnails", str(tmp_path), "--data", str(mirrors)])
    count = len({tuple(one) for one in media if one})
    assert done.exit_code == 0 and f"{count} thumbnails written" in done.stdout and count > 0
    for image, one in zip(images, media, strict=True):
        shown = picture(one, results.parent)
        assert (shown is None) == (image is None)
        if shown:
            small = Image.open(io.BytesIO(base64.b64decode(shown.partition(",")[2])))
            assert small.size == image.size
    again = CliRunner().invoke(app, ["leaderboard", "thumbnails", str(results), "--data", str(mirrors)])
    assert ": 0 thumbnails written" in again.stdout


def test_other_data_than_the_evaluated_are_refused(mirrors, tmp_path, monkeypatch):
    monkeypatch.chdir(mirrors)
    shown = next(index for index, row in enumerate(ROWS) if row["image"])
    images = [Image.new("RGB", (30, 30), "red") if index == shown else None for index in range(len(ROWS))]
    results, _ = write_run(tmp_path / "run", images)
    with pytest.raises(QVLMError, match=f"the image of document {shown} of scienceqa is not the one"):
        write_thumbnails(results)
    assert not (results.parent / "thumbnails").exists()


def test_runs_without_digests_are_refused(tmp_path):
    results, _ = write_run(tmp_path / "other", [None], qvlm=False)
    with pytest.raises(QVLMError, match="only runs of --model qvlm record digests"):
        write_thumbnails(results)
    results, _ = write_run(tmp_path / "ours", [None])
    (results.parent / "r_samples_scienceqa.jsonl").unlink()
    with pytest.raises(QVLMError, match="--log_samples"):
        write_thumbnails(results)
