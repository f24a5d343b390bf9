"""A trial run: the harness evaluates two documents with a tiny quantized model, in a temporary folder."""

import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.utils import logging

from qvlm_plugin.atomic import follow_umask
from qvlm_plugin.doctor.fault import Fault, read_fault
from qvlm_plugin.doctor.finding import Finding, Status
from qvlm_plugin.doctor.tiny_llava import random_image, write_tiny_llava
from qvlm_plugin.report.results import read_results
from qvlm_plugin.report.runs import Cell, Outcome, Setting, run_cell

SUBJECT = "trial run"
DOCUMENTS = 2

_TASK = "qvlm_trial"
_DEFINITION = f"""\
task: {_TASK}
dataset_path: documents
test_split: test
output_type: generate_until
doc_to_visual: !function lmms_eval.tasks.scienceqa.utils.sqa_doc_to_visual
doc_to_text: question
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 4, temperature: 0, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
_METHOD = "rtn"
_CELL = Cell(
    "run",
    {
        "pretrained": "./model", "dtype": "float32", "method": _METHOD, "scheme": "w4a4",
        "calibration": f"calibration.json:{DOCUMENTS}", "calibration_batch_size": str(DOCUMENTS),
    },
    (_TASK,),
)  # fmt: skip
_CACHES = ("HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_MODULES_CACHE", "LMMS_EVAL_DATASETS_CACHE", "QVLM_CACHE")


def check_trial() -> list[Finding]:
    """One finding: whether a real run of lmms-eval loads, quantizes, generates and writes results.

    It needs no network and writes only to the system's temporary folder, where the log of a failed run is kept.
    """
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="qvlm-doctor-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        _write(folder)
        setting = Setting(folder / "results", folder, include_path=folder / "tasks")
        outcome = run_cell(_CELL, setting, _environment(folder))
        if outcome.results and _is_complete(outcome.results):
            message = f"lmms-eval evaluated {DOCUMENTS} documents with a tiny model ({_METHOD}, w4a4)"
            return [Finding(SUBJECT, Status.OK, f"{message} in {time.monotonic() - began:.0f} s")]
        return [_failure(outcome)]


def _write(folder: Path) -> None:
    """Write model, task, documents and calibration samples."""
    with _without_bars():
        write_tiny_llava(folder / "model")
    (folder / "tasks").mkdir()
    (folder / "tasks" / f"{_TASK}.yaml").write_text(_DEFINITION)
    images = folder / "documents" / "test"
    images.mkdir(parents=True)
    rows, samples = [], []
    for index in range(DOCUMENTS):
        name, question = f"{index}.png", f"What is shown as number {index}?"
        random_image(index).save(images / name)
        rows.append({"file_name": name, "question": question, "answer": "noise"})
        turns = [{"from": "human", "value": f"<image>\nDescribe number {index}."}, {"from": "gpt", "value": "noise"}]
        samples.append({"image": f"documents/test/{name}", "conversations": turns})
    (images / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "calibration.json").write_text(json.dumps(samples))


def _environment(folder: Path) -> dict[str, str]:
    """Environment variables: offline, all caches in ``folder``, and absolute paths in PYTHONPATH.

    Paths are absolute because the run has another working directory.
    """
    paths = os.environ.get("PYTHONPATH")
    overlays = {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, paths.split(os.pathsep)))} if paths else {}
    caches = {variable: str(folder / "caches" / variable) for variable in _CACHES}
    return {"HF_HUB_OFFLINE": "1", "PYTHONFAULTHANDLER": "1", **caches, **overlays}


def _is_complete(results: Path) -> bool:
    """Whether there are scores of all documents, and the record of the quantization."""
    scores = read_results([results])
    recorded = all(score.run is not None and score.run["method"] == _METHOD for score in scores)
    return recorded and {score.documents for score in scores} == {DOCUMENTS}


def _failure(outcome: Outcome) -> Finding:
    """The finding for missing or incomplete results; keeps the log."""
    log = outcome.log.read_bytes()
    with tempfile.NamedTemporaryFile(prefix="qvlm-doctor-", suffix=".log", delete=False) as kept:
        kept.write(log)
    follow_umask(Path(kept.name))
    if outcome.results:
        fault = Fault("the results lack documents, or the record of the quantization")
    else:
        fault = read_fault(log.decode(errors="replace"))
    return Finding(SUBJECT, Status.FAIL, f"{fault}; log: {kept.name}", fault.remedy)


@contextmanager
def _without_bars() -> Iterator[None]:
    """Disables transformers' progress bars for its body."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
