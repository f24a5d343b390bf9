"""What the documents tell to type runs, page by page in one folder: on tiny models in folders named like hub ids.

Not here: `make` and `pip install .`, which make the environment that this runs in; the example package
(`test_example_plugin`); benchmarks (`test_benchmarks`) and ablations (`report/test_ablation`); released checkpoints
(`reproduce.md`). They run in programs that start at once (`warm`).
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from harness.mirrors import environment_in, write_conversations, write_mirrors
from original_llava import write_original_llava
from test_docs import DOCS, ROOT, SHELL, code_blocks
from tiny_llava import write_tiny_llava

MODEL = "llava-hf/llava-1.5-7b-hf"
SMALLER = {
    "--device cuda": "--device cpu",
    "--models demo": f"--models $PWD/{MODEL}",
    "--pretrained demo": f"--pretrained {MODEL}",
    "qvlm_scienceqa,qvlm_vizwiz,qvlm_vqav2": "qvlm_vqav2",
    "--limit 100": "--limit 3",
}
"""Machine, model and sizes that commands name, and what they are here."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with all that the documents take for granted."""
    place = write_mirrors(tmp_path_factory.mktemp("documents"), stand_in=False)
    write_tiny_llava(place / MODEL)
    write_original_llava(place / "liuhaotian" / "llava-v1.5-7b")
    (place / "images").mkdir()
    write_conversations(place / "llava_mix.json", range(100, 164), place / "images")
    return place


def script(page):
    """The commands of a page that this file is about, as one shell script."""
    blocks = [block for language, block in code_blocks(page) if language in SHELL]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    ours = [line.removeprefix("$ ") for line in lines if re.match(r"(\$ )?(qvlm|lmms-eval) ", line)]
    text = "\n".join(ours)
    for written, here in SMALLER.items():
        text = text.replace(written, here)
    return text


def run(place, programs, text):
    """Run a script there with the programs of a folder; returns what it printed."""
    environment = environment_in(place) | {"PATH": os.pathsep.join([str(programs), os.environ["PATH"]])}
    done = subprocess.run(
        ["bash", "-exo", "pipefail", "-c", text],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return done.stdout


def test_readme(place, programs):
    printed = run(place, programs, script(ROOT / "README.md"))
    assert "w4a4" in printed and "for backend=packed" in printed  # what the model needs was found


def test_troubleshooting():
    assert script(DOCS / "troubleshooting.md") in script(ROOT / "README.md")


def test_checkpoints(place, programs):
    printed = run(place, programs, script(DOCS / "checkpoints.md"))
    assert "q_proj" in printed  # of `qvlm inspect --modules`
    assert (place / "llava-w8a8" / "config.json").is_file() and (place / "llava-v1.5-7b-hf" / "config.json").is_file()


@pytest.fixture(scope="module")
def compared(place, programs):
    """What is printed by the commands of compare.md, up to those that publish."""
    text, _, _ = script(DOCS / "compare.md").partition("qvlm leaderboard add")
    return run(place, programs, text)


def test_compare(place, compared):
    assert "-m lmms_eval --model qvlm_llava" in compared  # what --dry-run tells
    assert (place / "compared" / "comparison.md").is_file() and (place / "leaderboard" / "leaderboard.html").is_file()
    assert (place / "figures" / "search.png").is_file() and (place / "figures" / "veo.png").is_file()


def test_publish(place, programs, compared):
    """The last commands of compare.md, on a run that may be published: of all documents, and no stand-in data."""
    arguments = f"pretrained={MODEL},method=rtn,scheme=w8a16"
    run(
        place,
        programs,
        f"lmms-eval --model qvlm_llava --model_args {arguments} --tasks vqav2_val,vqav2_test --log_samples "
        "--output_path compared/model/qvlm-w4a4",
    )
    (results,) = (place / "compared" / "model").rglob("*_results.json")
    (submission,) = (place / "compared" / "model").rglob("vqav2-test-submission-*.json")
    _, command, rest = script(DOCS / "compare.md").partition("qvlm leaderboard add")
    text = re.sub(r"compared/…/\S*_results.json", str(results), command + rest)
    text = re.sub(r"compared/…/submissions/\S*.json", str(submission), text)
    assert "…" not in text
    (place / "llava-1.5-7b-w4a4").mkdir()
    (place / "llava-1.5-7b-w4a4" / "README.md").write_text("# Model\n")
    run(place, programs, text)
    assert list((place / "shared-results").rglob("*_results.json"))
    assert "model-index" in (place / "llava-1.5-7b-w4a4" / "README.md").read_text()


def test_choose(place, programs, compared):
    assert "Packed size is that of the weights" in run(place, programs, script(DOCS / "choose.md"))


@pytest.mark.parametrize("page", ["results.md", "results-demo.md"])
def test_paired(place, programs, compared, page):
    """Of runs that compare.md's grid left, under the names that the page has."""
    cells = {cell.name: cell for cell in (place / "compared" / "llava-1.5-7b-hf").iterdir()}
    text = script(DOCS / page)
    for named in set(re.findall(r"[\w-]*results/[\w.-]+", text)):
        method = Path(named).name.partition("-")[0]
        method = {"qvlm": "qvlm_rotated", "qvlm_jacobian": "qvlm_rotated", "rtn": "qlora"}.get(method, method)
        cell = cells[f"{method}-w16a16" if method == "none" else f"{method}-w4a4"]
        shutil.copytree(cell, place / named, dirs_exist_ok=True)
    assert run(place, programs, text).count("- baseline: ") == text.count("qvlm paired") > 0
