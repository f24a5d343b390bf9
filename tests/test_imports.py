"""What imports what, seen in fresh interpreters."""

import json
import subprocess
import sys
from importlib.metadata import entry_points

import pytest
import torch
from report.logged import scored, write_run

from qvlm_plugin.plan import RoundingPlan

BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "lmms_eval":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block())
"""


def python(code, *arguments):
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_is_cheap():
    code = "import sys, qvlm_plugin; print(qvlm_plugin.__version__, *{'torch', 'transformers'} & sys.modules.keys())"
    assert len(python(code).split()) == 1


@pytest.fixture
def folders(tmp_path):
    """A plan and the results of two runs, by the word that stands for each."""
    plan = RoundingPlan("rtn", "w4a4", {}, "0" * 64, modules=(), tensors={"site/lower": torch.ones(3)})
    runs = {name: tmp_path / name for name in ("one", "other")}
    for folder in runs.values():
        write_run(folder, {"quiz": scored([1, 0, 1])})
    return {"PLAN": str(plan.save(tmp_path / "plan")), "ONE": str(runs["one"]), "OTHER": str(runs["other"])}


def test_commands_that_touch_no_tensor_import_nothing_heavy(folders):
    code = """
import json, sys
from qvlm_plugin.cli import app
HEAVY = {"torch", "transformers", "accelerate", "datasets", "lmms_eval", "pandas", "statsmodels", "scipy.stats"}
for command in json.loads(sys.argv[1]):
    sys.argv[1:] = command
    status = app(command, standalone_mode=False)
    assert not status, (command, status)
    assert not HEAVY & sys.modules.keys(), (command, HEAVY & sys.modules.keys())
"""
    lines = (
        "--help", "--version", "methods", "arguments", "inspect PLAN --modules", "results ONE OTHER",
        "paired ONE OTHER", "advise --help", "leaderboard --help", "search --help", "export --help", "compare --help",
    )  # fmt: skip
    shown = python(code, json.dumps([[folders.get(word, word) for word in line.split()] for line in lines]))
    assert all(text in shown for text in ("qlora", "ratio_step", "plan hash", "exact_match", "(Holm)"))


def test_requests_are_checked_without_torch():
    code = """
import sys
from qvlm_plugin.plan_request import check_request
print(check_request("qvlm", "w4a4", {"veo": False}).batch_size, *{"torch", "transformers"} & sys.modules.keys())
"""
    assert python(code) == "8"


def test_the_quantizer_may_be_imported_first():
    code = """
from qvlm_plugin.hf_quantizer import QUANT_METHOD, QVLMHfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
assert AUTO_QUANTIZER_MAPPING[QUANT_METHOD] is QVLMHfQuantizer
"""
    python(code)


def test_the_core_works_without_the_harness(tiny_llava):
    code = """
import pkgutil, importlib, torch, qvlm_plugin
for module in pkgutil.walk_packages(qvlm_plugin.__path__, "qvlm_plugin."):
    if not module.name.startswith(("qvlm_plugin.harness", "qvlm_plugin.tasks")):
        importlib.import_module(module.name)
assert not any(name.startswith("lmms_eval") for name in sys.modules)
from qvlm_plugin.conversation import Conversation, encode
from qvlm_plugin.models.loading import load
from qvlm_plugin.plan_request import check_request
from qvlm_plugin.planning import apply, obtain_plan
loaded = load(sys.argv[1], dtype="float32")
apply(obtain_plan(loaded, check_request("rtn", "w4a16", {}), None, None), loaded)
inputs, _ = encode(loaded.processor, [Conversation.from_prompt("what?")])
print(loaded.model.generate(**inputs, max_new_tokens=3).shape[1] - inputs["input_ids"].shape[1])
"""
    assert python(BLOCK + code, str(tiny_llava)) in ("1", "2", "3")


def test_the_manifest_imports_nothing_of_ours():
    code = """
import sys
import lmms_eval.models.registry_v2
before = set(sys.modules)
from qvlm_plugin.harness.manifest import manifests
one, other = manifests()
print(one.model_id, other.model_id, *sorted(set(sys.modules) - before))
"""
    one, other, *modules = python(code).splitlines()[-1].split()
    assert (one, other) == ("qvlm", "qvlm_llava")
    # Where transformers is imported already, the quantizer is entered there.
    ours = {"qvlm_plugin", "qvlm_plugin.registration", "qvlm_plugin.hf_quantizer", "qvlm_plugin.errors"}
    ours |= {"qvlm_plugin.models", "qvlm_plugin.models.moe_stablelm_config"}
    assert set(modules) <= ours | {"qvlm_plugin.harness", "qvlm_plugin.harness.manifest"}


def test_the_manifest_names_the_tasks_when_an_evaluation_begins():
    code = """
from lmms_eval import evaluator
from lmms_eval.tasks import TaskManager
found = TaskManager("ERROR")
print(*(name for name in found.all_tasks if name.startswith("qvlm")), found.all_groups.count("qvlm"))
"""
    names = "qvlm qvlm_scienceqa qvlm_scienceqa_lepa qvlm_vizwiz qvlm_vqav2 1"
    assert python(code).splitlines()[-1] == names


def test_the_manifest_never_raises():
    assert python(BLOCK + "from qvlm_plugin.harness.manifest import manifests; print(manifests())") == "[]"


def test_the_entry_point_is_registered():
    (entry,) = [entry for entry in entry_points(group="lmms_eval.models") if entry.name == "qvlm"]
    assert entry.value == "qvlm_plugin.harness.manifest:manifests"


def test_the_harness_finds_both_formats():
    from lmms_eval.models import get_model

    assert get_model("qvlm_llava").is_simple is False
    assert get_model("qvlm_llava", force_simple=True).is_simple is True
