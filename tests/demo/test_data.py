import json
import shutil
from collections import Counter

import pytest
from datasets import load_dataset
from PIL import Image

from qvlm_plugin.conversation import Conversation
from qvlm_plugin.demo.data import (
    MARKER,
    SCIENCEQA_FEATURES,
    VIZWIZ_FEATURES,
    VQAV2_FEATURES,
    calibration_samples,
    mirrors,
    write_mirrors,
)
from qvlm_plugin.demo.questions import SCIENCEQA, VIZWIZ, VQAV2, example
from qvlm_plugin.errors import QVLMError

SETS = {
    ("lmms-lab-encoder/ScienceQA", "ScienceQA-FULL"): (SCIENCEQA_FEATURES, {"train", "validation", "test"}),
    ("lmms-lab-encoder/ScienceQA", "ScienceQA-IMG"): (SCIENCEQA_FEATURES, {"train", "validation", "test"}),
    ("lmms-lab-encoder/VizWiz-VQA", None): (VIZWIZ_FEATURES, {"val", "test"}),
    ("lmms-lab-encoder/VQAv2", None): (VQAV2_FEATURES, {"validation", "testdev", "test"}),
}


@pytest.fixture
def loaded(demo_data, tmp_path, monkeypatch):
    """All sets as the harness loads them: by hub id, from the folder the mirrors are in, offline."""
    monkeypatch.chdir(demo_data)
    return {key: load_dataset(*key, cache_dir=str(tmp_path / "arrow")) for key in SETS}


def test_sets_load_by_hub_id_with_schema_and_splits(loaded):
    for key, (features, splits) in SETS.items():
        assert set(loaded[key]) == splits
        for split in loaded[key].values():
            assert split.features == features
    full, img = (loaded["lmms-lab-encoder/ScienceQA", f"ScienceQA-{name}"] for name in ("FULL", "IMG"))
    for split in full:
        assert 0 < sum(image is None for image in full[split]["image"]) < len(full[split]) / 2
        assert all(isinstance(image, Image.Image) for image in img[split]["image"])
    assert loaded["lmms-lab-encoder/VQAv2", None]["validation"][0]["answers"][9]["answer_id"] == 10
    assert loaded["lmms-lab-encoder/VQAv2", None]["test"][0]["answers"] is None
    assert len(loaded["lmms-lab-encoder/VizWiz-VQA", None]["val"][0]["answers"]) == 10


def test_evaluated_splits_are_large_and_not_guessed():
    by_id = {mirror.hub_id.split("/")[1]: mirror.splits for mirror in mirrors()}
    evaluated = [
        (SCIENCEQA, by_id["ScienceQA"]["ScienceQA-FULL", "test"]),
        (SCIENCEQA, by_id["ScienceQA"]["ScienceQA-IMG", "test"]),
        (VIZWIZ, by_id["VizWiz-VQA"]["default", "val"]),
        (VQAV2, by_id["VQAv2"]["default", "validation"]),
    ]
    for benchmark, documents in evaluated:
        assert 1500 <= len(documents) <= 2500
        answers = Counter(example(benchmark, doc).answer for doc in documents)
        assert answers.most_common(1)[0][1] / len(documents) < 0.42
    unanswerable = sum(doc["category"] == "unanswerable" for doc in by_id["VizWiz-VQA"]["default", "val"])
    assert 0.15 < unanswerable / 2000 < 0.3


def test_splits_share_no_picture_and_no_prompt():
    pictures, texts = {}, {}
    for mirror in mirrors():
        for (_, split), documents in mirror.splits.items():
            group = split if split in ("train", "validation") and "ScienceQA" in mirror.hub_id else "test"
            for doc in documents:
                if doc["image"] is None:
                    texts.setdefault(group, set()).add(SCIENCEQA.prompt(doc))
                else:
                    pictures.setdefault(group, set()).add(doc["image"])
    pictures["train"] |= {doc["image"] for _, doc in calibration_samples() if doc["image"]}
    texts["train"] |= {SCIENCEQA.prompt(doc) for _, doc in calibration_samples() if not doc["image"]}
    for seen in (pictures, texts):
        assert set(seen) == {"train", "validation", "test"}
        assert not seen["train"] & seen["test"]
        assert not seen["train"] & seen["validation"]
        assert not seen["validation"] & seen["test"]
    assert {picture.source for picture in pictures["test"]} == {"test", "empty"}
    assert {picture.source for picture in pictures["train"] | pictures["validation"]} == {"train", "empty"}


def test_every_folder_is_marked_as_stand_in_data(demo_data):
    folders = [demo_data / hub_id for hub_id, _ in SETS] + [demo_data / "calibration"]
    for folder in folders:
        marker = json.loads((folder / MARKER).read_text())
        assert marker["stand_in"] is True
        assert marker["made_from"] == "easy-VQA 1.0"
        assert len(marker["sha256"]) == 64
        assert "STAND-IN DATA" in (folder / "README.md").read_text()


def written(folder):
    """All files but the lock, which a writer may touch."""
    return sorted(path for path in folder.rglob("[!.]*") if path.is_file())


def test_writing_again_is_idempotent_and_restores_missing_files(demo_data):
    files = written(demo_data)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}
    folder = demo_data / "lmms-lab-encoder" / "VQAv2"
    shutil.rmtree(folder)
    write_mirrors(demo_data)
    assert written(demo_data) == files
    for path, (time, content) in before.items():
        assert path.read_bytes() == content
        assert folder in path.parents or path.stat().st_mtime_ns == time


def test_refuses_to_replace_real_data(tmp_path):
    real = tmp_path / "lmms-lab-encoder" / "ScienceQA"
    real.mkdir(parents=True)
    (real / "README.md").write_text("the real thing")
    with pytest.raises(QVLMError, match="contains other data than the demo"):
        write_mirrors(tmp_path)
    assert [path.name for path in real.iterdir()] == ["README.md"]


def test_calibration_is_in_llavas_format_and_disjoint_from_evaluated_data(demo_data, loaded):
    rows = json.loads((demo_data / "calibration" / "train.json").read_text())
    assert len(rows) == len({row["id"] for row in rows}) == 480
    digests = set()
    for row in rows:
        human, gpt = row["conversations"]
        assert (human["from"], gpt["from"]) == ("human", "gpt")
        assert human["value"].startswith("<image>\n") == ("image" in row)
        images = [Image.open(demo_data / "calibration" / row["image"])] if "image" in row else []
        digests.add(Conversation.from_prompt(human["value"], images).digest())
    ends = Counter(row["conversations"][0]["value"].split("\n")[-1] for row in rows)
    assert min(ends.values()) >= 200
    assert any("'Unanswerable'" in row["conversations"][0]["value"] for row in rows)
    for doc in loaded["lmms-lab-encoder/ScienceQA", "ScienceQA-FULL"]["test"]:
        asked = Conversation.from_prompt(SCIENCEQA.prompt(doc), [doc["image"]] if doc["image"] else [])
        assert asked.digest() not in digests
