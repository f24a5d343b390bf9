"""Every family through the harness's command line: quantized at load time, on a tiny mirror of a standard task."""

import json
import subprocess

import pytest
import yaml
from family_list import FAMILIES
from harness.mirrors import environment_in, write_mirrors
from tiny_families import write_tiny_aya_vision, write_tiny_seer, write_tiny_vip_llava

TRACED = {"aya-vision": write_tiny_aya_vision, "seer": write_tiny_seer, "vip-llava": write_tiny_vip_llava}
"""Families without a description."""
ALL = FAMILIES | TRACED
CONV = {"llava-v1.3": "llava_v1", "llava-v1.5": "vicuna_v1", "moe-llava": "stablelm"}


@pytest.fixture(scope="module")
def results(tmp_path_factory, programs):
    """The results of one process that runs all families, by name; and of LLaVA v1.3 with another prompt format."""
    place = write_mirrors(tmp_path_factory.mktemp("families"))
    runs = []
    for name, write in ALL.items():
        write(place / name)
        options = "method=rtn,scheme=w4a4,calibration=vqav2_val:train:2,calibration_batch_size=2,cache=none"
        arguments = f"pretrained=./{name},dtype=float32,{options}"
        if name in TRACED:
            arguments += ",topology=traced" + ",trust_remote_code=true" * (name == "seer")
        model = "qvlm_llava" if "llava" in name else "qvlm"
        runs.append({"model": model, "model_args": arguments, "output_path": f"out/{name}"})
    chosen = "pretrained=./llava-v1.3,dtype=float32,conv=llava_v0"
    runs.append({"model": "qvlm_llava", "model_args": chosen, "output_path": "out/chosen"})
    common = {"tasks": "vqav2_val", "batch_size": "4", "limit": 4.0, "log_samples": True}
    (place / "runs.yaml").write_text(yaml.safe_dump([common | one for one in runs]))
    command = [programs / "lmms-eval", "--config", "runs.yaml"]
    done = subprocess.run(command, cwd=place, env=environment_in(place), capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {}
    for name in [*ALL, "chosen"]:
        files = list((place / "out" / name).rglob("*_results.json"))
        assert files, f"{name}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
        samples = [line for file in files[0].parent.glob("*_samples_*.jsonl") for line in file.read_text().splitlines()]
        found[name] = json.loads(files[0].read_text()) | {"logged": [json.loads(line) for line in samples]}
    return found


@pytest.mark.parametrize("name", ALL)
def test_a_quantized_family_is_evaluated(results, name):
    result = results[name]
    assert 0 <= result["results"]["vqav2_val"]["exact_match,none"] <= 1 and len(result["logged"]) == 4
    qvlm = result["qvlm"]
    assert (qvlm["method"], qvlm["scheme"], qvlm["calibration"]["documents_also_evaluated"]) == ("rtn", "w4a4", 0)
    for part in {"vision", "projector", "decoder"} & qvlm["bits"].keys() | {"vision", "decoder"}:
        assert qvlm["bits"][part]["activation"] == 4 and qvlm["bits"][part]["weight"] < 6
    assert qvlm["conv"] == CONV.get(name, "the checkpoint's own")
    assert qvlm["uncalibrated_expert_inputs"] >= 0 and qvlm["router_noise_seed"] is None


def test_a_chosen_format_is_recorded_and_ends_answers(results):
    qvlm = results["chosen"]["qvlm"]
    assert qvlm["conv"] == "llava_v0" and qvlm["method"] == "none"
    assert not any("###" in answer for sample in results["chosen"]["logged"] for answer in sample["filtered_resps"])
