"""Files that name other files, or bring code: nothing outside the given folder is read, nothing is run."""

import json
import os
import pickle
import shutil

import pytest
import torch
from hostile.watching import watched
from original_llava import write_original_llava
from tiny_llava import random_image, write_tiny_llava

from qvlm_plugin import planning
from qvlm_plugin.calibration import read_calibration
from qvlm_plugin.checkpoint import CheckpointRecord, verify_files
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.export import export
from qvlm_plugin.models.loading import load
from qvlm_plugin.plan_request import check_request
from qvlm_plugin.reading import inside


@pytest.fixture
def folder(tmp_path):
    """A place for what may be read, with secrets around it."""
    (tmp_path / "given").mkdir()
    random_image(0).save(tmp_path / "secret.png")
    write_original_llava(tmp_path / "secret-llava", layers=1)
    return tmp_path / "given"


OUTSIDE = ["../secret.png", "a/../../secret.png", "/etc/passwd", "", "..", "a\0b", "a\nb", 5, None, ["a"]]


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_that_lead_out_of_a_folder_are_refused(name, folder):
    with pytest.raises(QVLMError, match="is not the name of a file in") as caught:
        inside(folder, name, "x")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["a.png", "coco/train2017/0001.jpg", "name with blanks…", "..a/b.."])
def test_names_inside_a_folder_are_kept(name, folder):
    assert inside(folder, name, "x") == folder / name


@pytest.mark.parametrize("name", OUTSIDE[:3])
def test_images_of_conversations_stay_in_their_folder(name, folder):
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "that"}]
    (folder / "rows.json").write_text(json.dumps([{"image": name, "conversations": turns}]))
    with pytest.raises(QVLMError, match="is not the name of a file in"), watched(folder):
        read_calibration(f"{folder / 'rows.json'}:1", None, 0, None)


@pytest.mark.parametrize("name", OUTSIDE[:3])
def test_files_of_a_quantized_checkpoint_stay_in_its_folder(name, folder, tmp_path):
    loaded = load(str(write_tiny_llava(folder / "model", layers=1)), dtype="bfloat16")
    request = check_request("rtn", "w4a16", {"group_size": 16})
    export(planning.obtain_plan(loaded, request, None, None), loaded, folder / "x")
    config = json.loads((folder / "x" / "config.json").read_text())
    config["quantization_config"]["files"][name] = "0" * 64
    (folder / "x" / "config.json").write_text(json.dumps(config))
    with pytest.raises(QVLMError, match="is not the name of a file in"), watched(folder):
        verify_files(CheckpointRecord.read(config["quantization_config"]), folder / "x")
    with pytest.raises(QVLMError, match="is not the name of a file in"), watched(folder):
        load(str(folder / "x"))


@pytest.mark.parametrize("layout", ["own", "hugging face"])
@pytest.mark.parametrize("name", ["../secret-llava/pytorch_model.bin", "/etc/passwd", 5])
def test_shards_stay_in_the_checkpoint(name, layout, folder):
    if layout == "own":
        write_original_llava(folder, shards=2, layers=1)
        index = folder / "pytorch_model.bin.index.json"
    else:
        write_tiny_llava(folder, layers=1)
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {}}))
    content = json.loads(index.read_text())
    content["weight_map"]["lm_head.weight"] = name
    index.write_text(json.dumps(content))
    with pytest.raises(QVLMError, match="is not the name of a file in"), watched(folder):
        load(str(folder))


@pytest.mark.parametrize("tower", ["../secret-llava/tower", "{secret}/tower", "~/tower", 5, ["tower"], ".."])
def test_towers_outside_the_checkpoint_are_not_read(tower, folder, tmp_path):
    write_original_llava(folder, layers=1)
    shutil.rmtree(folder / "tower")
    config = json.loads((folder / "config.json").read_text())
    config["mm_vision_tower"] = tower.format(secret=tmp_path / "secret-llava") if isinstance(tower, str) else tower
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(QVLMError, match="vision tower"), watched(folder):
        load(str(folder))


class Evil:
    """Its pickle leaves a trace where it is loaded."""

    def __reduce__(self):
        return os.mkdir, (os.environ["TRACE"],)


@pytest.fixture
def trace(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACE", str(tmp_path / "trace"))
    return tmp_path / "trace"


def test_nothing_is_unpickled(folder, trace):
    write_original_llava(folder, layers=1)
    with watched(folder):
        load(str(folder))  # .bin files of tensors
    for spoil in (
        lambda file: file.write_bytes(pickle.dumps({"model.norm.weight": Evil()})),
        lambda file: torch.save({"model.norm.weight": Evil()}, file),
        lambda file: torch.save(Evil(), file),
    ):
        spoil(folder / "pytorch_model.bin")
        with pytest.raises(QVLMError, match=r"pickled code or is damaged"), watched(folder):
            load(str(folder))
    (folder / "tower" / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    assert not trace.exists()
    pickle.loads(pickle.dumps(Evil()))
    assert trace.exists()  # the trap works


CODE = "import os\nos.makedirs(os.environ['TRACE'], exist_ok=True)\n"
CLASSES = """
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
class Config(LlavaConfig):
    model_type = "evil"
class Model(LlavaForConditionalGeneration):
    config_class = Config
"""


def bring_code(folder, model_type):
    """Let every file of a checkpoint that can name code name some."""
    for module in ("evil", "custom_generate/generate"):
        (folder / module).parent.mkdir(exist_ok=True)
        (folder / f"{module}.py").write_text(CODE + CLASSES)
    classes = ("AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoProcessor", "AutoTokenizer")
    names = dict.fromkeys((*classes, "AutoImageProcessor"), "evil.Config")
    for file in folder.glob("*config.json"):
        content = json.loads(file.read_text())
        if file.name == "config.json":
            content["model_type"] = model_type
        file.write_text(json.dumps(content | {"auto_map": names}))


def test_code_of_a_checkpoint_is_run_only_on_request(folder, trace):
    known, unknown = folder / "known", folder / "unknown"
    bring_code(write_tiny_llava(known, layers=1), "llava")
    bring_code(write_tiny_llava(unknown, layers=1), "evil")
    with watched(folder):
        load(str(known))
    with pytest.raises(QVLMError, match=r"whose code comes with it"), watched(folder):
        load(str(unknown))
    assert not trace.exists()
    with pytest.raises(QVLMError):  # its processor's class is a configuration
        load(str(unknown), trust_remote_code=True)
    assert trace.exists()


def test_code_of_a_tower_is_not_run(folder, trace):
    write_original_llava(folder, layers=1)
    (folder / "tower" / "preprocessor_config.json").write_text("{}")
    bring_code(folder / "tower", "evil")
    for trusted in (False, True):  # the checkpoint is, not what it names
        with pytest.raises(QVLMError, match=r"vision tower 'tower': config\.json does not load"), watched(folder):
            load(str(folder), trust_remote_code=trusted)
    assert not trace.exists()


def test_towers_of_known_names_need_no_folder(folder):
    write_original_llava(folder, layers=1)
    shutil.rmtree(folder / "tower")
    config = json.loads((folder / "config.json").read_text())
    for name in ("openai/clip-vit-large-patch14", "/elsewhere/clip-vit-large-patch14"):
        (folder / "config.json").write_text(json.dumps(config | {"mm_vision_tower": name}))
        with pytest.raises(QVLMError, match=r"vision tower .*is neither a folder nor a hub model"):  # of its weights
            load(str(folder))
