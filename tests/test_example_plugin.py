"""docs/example-plugin, installed like any package, through the harness; beside a package whose hook raises."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from harness.mirrors import environment_in, write_mirrors
from tiny_families import write_tiny_qwen2_5_vl

EXAMPLE = Path(__file__).parents[1] / "docs" / "example-plugin"
BROKEN = "from qvlm_plugin.hooks import hookimpl\n@hookimpl\ndef qvlm_methods(): raise LookupError('no such thing')\n"


def pip_install(source, target):
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target"]
    done = subprocess.run([*command, target, source], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """A folder of installed packages: the example, and a broken one."""
    place = tmp_path_factory.mktemp("packages")
    for name in ("example", "broken"):
        shutil.copytree(EXAMPLE, place / name, ignore=shutil.ignore_patterns("__pycache__"))
    (place / "broken" / "qvlm_example.py").rename(place / "broken" / "qvlm_broken.py")
    (place / "broken" / "qvlm_broken.py").write_text(BROKEN)
    settings = place / "broken" / "pyproject.toml"
    settings.write_text(settings.read_text().replace("example", "broken"))
    for name in ("example", "broken"):
        pip_install(place / name, place / "installed")
    return place / "installed"


def test_it_is_short():
    assert len((EXAMPLE / "qvlm_example.py").read_text().splitlines()) < 80


def test_its_method_topology_and_kernel_run_through_the_harness(packages, tmp_path, programs):
    write_mirrors(tmp_path)
    write_tiny_qwen2_5_vl(tmp_path / "qwen")
    options = "method=shrunk,ratio=0.8,backend=brief,calibration=vqav2_val:train:2,calibration_batch_size=2,cache=none"
    command = [
        programs / "lmms-eval", "--model", "qvlm_llava", "--model_args", f"pretrained=./qwen,{options}",
        "--tasks", "vqav2_val", "--limit", "2", "--output_path", "out",
    ]  # fmt: skip
    environment = environment_in(tmp_path)
    environment["PYTHONPATH"] = os.pathsep.join([str(packages), *filter(None, [environment.get("PYTHONPATH")])])
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    (file,) = (tmp_path / "out").rglob("*_results.json") if done.returncode == 0 else ()
    qvlm = json.loads(file.read_text())["qvlm"]
    assert (qvlm["method"], qvlm["backend"]) == ("shrunk", "brief")
    assert set(qvlm["kernels"]) == {"brief"} and qvlm["bits"]["vision"]["activation"] == 4
    complaint = "plugin broken of package qvlm-broken is left out: qvlm_methods raised LookupError: no such thing"
    assert complaint in done.stdout + done.stderr
