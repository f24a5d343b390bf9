"""Checks of `qvlm doctor`: whether lmms-eval finds this package, its tasks and their data."""

import contextlib
import io
from collections.abc import Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import datasets
from datasets.load import CachedDatasetModuleFactory
from lmms_eval.models import list_available_models
from lmms_eval.tasks import TaskManager
from lmms_eval.utils import load_yaml_config

from qvlm_plugin.doctor.finding import Finding, Status
from qvlm_plugin.harness import tasks
from qvlm_plugin.harness.manifest import MODEL_IDS

GROUP = "lmms_eval.models"


def check_registration() -> list[Finding]:
    """Whether ``--model qvlm`` is known, and which entry points of other packages raise."""
    broken = []
    for entry in metadata.entry_points(group=GROUP):
        try:
            payload = entry.load()
            if callable(payload):
                payload()
        except Exception as error:  # another package may raise anything
            owner = entry.dist.name if entry.dist else "unknown"
            broken.append(
                (owner, f"entry point {entry.name} of package {owner} raises {type(error).__name__}: {error}")
            )
    visible = set(MODEL_IDS) <= set(list_available_models())
    status = Status.WARN if visible else Status.FAIL
    findings = [
        Finding("lmms-eval", status, f"{message}; it can hide the models of all plugins", f"pip uninstall {owner}")
        for owner, message in broken
    ]
    if visible:
        message = f"{metadata.version('lmms_eval')} knows --model {' and '.join(MODEL_IDS)}"
        findings.insert(0, Finding("lmms-eval", Status.OK, message))
    elif not broken:
        message = f"does not know --model {MODEL_IDS[0]}: there is no entry point {GROUP} of qvlm_plugin"
        findings.append(Finding("lmms-eval", Status.FAIL, message, "pip install qvlm_plugin again"))
    return findings


def check_tasks(names: Sequence[str]) -> list[Finding]:
    """Whether lmms-eval finds the package's own tasks by name, and the data of each task in ``names``."""
    tasks.install()
    with contextlib.redirect_stdout(io.StringIO()):
        manager = TaskManager("ERROR")
    folders = find_spec("qvlm_plugin.tasks").submodule_search_locations
    own = {file.stem for folder in folders for file in Path(folder).glob("*.yaml")}
    missing = sorted(own - set(manager.all_tasks))
    if missing:
        remedy = f"lmms-eval --include_path {folders[0]}"
        findings = [Finding("tasks", Status.WARN, f"not known by name: {', '.join(missing)}", remedy)]
    else:
        findings = [Finding("tasks", Status.OK, f"known by name: {', '.join(sorted(own))}")]
    return findings + [_check_data(manager, name) for name in names]


def _check_data(manager: TaskManager, name: str) -> Finding:
    subject = f"data of {name}"
    if name not in manager.all_subtasks:
        return Finding(subject, Status.FAIL, "there is no such task", "see: lmms-eval tasks list")
    config = load_yaml_config(manager.task_index[name]["yaml_path"], mode="simple")
    path = config["dataset_path"]
    if Path(path).is_dir():
        stand_in = " (stand-in data)" if (Path(path) / "stand_in.json").is_file() else ""
        return Finding(subject, Status.OK, f"{path}: a folder in the working directory{stand_in}")
    try:
        CachedDatasetModuleFactory(path).get_module()
    except (FileNotFoundError, ValueError):
        if datasets.config.HF_HUB_OFFLINE:
            remedy = "run once with a network and without HF_HUB_OFFLINE=1, or see: qvlm demo data --help"
            return Finding(subject, Status.FAIL, f"{path} is not on this machine, and HF_HUB_OFFLINE is set", remedy)
        remedy = "run the task once while there is a network"
        return Finding(subject, Status.WARN, f"{path} is not on this machine yet; it will be downloaded", remedy)
    return Finding(subject, Status.OK, f"{path}: in the cache")
