"""Whatever a file or an argument says, the answer is a result or a one-line `QVLMError`; `make fuzz` tries many more.

Files hold hostile content where an attacker could put it: hashes are made to fit where the attacker writes them too.
"""

import contextlib
import hashlib
import json
import shutil
import time

import pytest
import torch
import yaml
from harness.mirrors import write_mirrors
from hostile.mutation import NUMBER, VALUES, blobs, edited, texts
from hostile.watching import watched
from hypothesis import given, settings
from hypothesis import strategies as st
from lmms_eval.tasks import TaskManager
from lmms_eval.utils import simple_parse_args_string
from original_llava import write_original_llava
from report.leaderboard.test_adding import facts
from report.leaderboard.written import content, samples, write
from rotations import rotated
from stored_codes import with_codes
from tiny_llava import random_image, write_tiny_llava
from torch import nn

from qvlm_plugin import backends, planning
from qvlm_plugin.calibration import CalibrationSet, Sample, parse_sources, read_calibration
from qvlm_plugin.checkpoint import CheckpointRecord, lay_out, verify_files
from qvlm_plugin.conversation import Conversation
from qvlm_plugin.errors import QVLMError
from qvlm_plugin.export import export
from qvlm_plugin.harness import task_source
from qvlm_plugin.harness.arguments import ModelArguments, parse_arguments
from qvlm_plugin.models.loading import load
from qvlm_plugin.plan import RoundingPlan, check_plan
from qvlm_plugin.plan_header import ModulePlan, table_hash
from qvlm_plugin.plan_request import check_request
from qvlm_plugin.report.compare.grid import cells, read_grid
from qvlm_plugin.report.leaderboard.adding import add_run
from qvlm_plugin.report.leaderboard.page import html_text
from qvlm_plugin.report.leaderboard.ranking import rank
from qvlm_plugin.report.leaderboard.reading import read_board
from qvlm_plugin.report.leaderboard.schema import find_results_files
from qvlm_plugin.report.leaderboard.tables import csv_text, json_text, markdown_text
from qvlm_plugin.report.results import read_results, results_grid
from qvlm_plugin.report.runs import Cell, finished_cells
from qvlm_plugin.report.samples import check_same_documents, read_samples
from qvlm_plugin.report.seal import seal
from qvlm_plugin.report.submission import check_submission
from qvlm_plugin.scheme import Scheme
from qvlm_plugin.workspace import Workspace


def inputs(percent):
    """That share of the profile's number of inputs (see ../conftest.py)."""
    return settings(max_examples=max(1, settings.default.max_examples * percent // 100))


@contextlib.contextmanager
def refused_or_read():
    """What is read may be refused, in one line; any other error fails."""
    try:
        yield
    except QVLMError as error:
        assert len(str(error).splitlines()) == 1


def put(file, text):
    file.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The one folder that may be read; secrets lie beside and above it."""
    above = tmp_path_factory.mktemp("hostile")
    (above / "given").mkdir()
    for secret in (above / "secret", above.parent / "secret"):
        secret.write_bytes(b"secret")
    return above / "given"


@pytest.fixture(scope="module")
def searched(place):
    """A tiny model, and a plan for it with all kinds of tensors."""
    loaded = load(str(write_tiny_llava(place / "model", layers=1, vision_layers=2)), dtype="float32")
    shown = [Sample(Conversation.from_prompt(f"what is {i}?", [random_image(i)]), "that") for i in range(2)]
    options = {"calibration_batch_size": 2, "alpha_steps": 2, "bias_correction": True, "group_size": 16}
    plan = planning.obtain_plan(loaded, check_request("awq", "w4a4", options), CalibrationSet(tuple(shown)), None)
    plan = rotated(plan, {module.site for module in plan.modules if module.part == "vision"})
    return loaded, with_codes(plan, load(str(place / "model"), dtype="float32"), parts=("vision",))[0]


# Texts that are typed

PIECES = ["w", "a", "4", "8", "16", "+", ":", ",", "=", "vision", "projector", "decoder", " ", "²", "٣", "\0", "-", "."]


@given(st.lists(st.sampled_from([*PIECES, "w4a4", NUMBER]), max_size=8).map("".join) | st.text(max_size=12))
@inputs(1200)
def test_schemes(text):
    with refused_or_read():
        assert Scheme.parse(str(Scheme.parse(text))) == Scheme.parse(text)


@given(st.lists(st.sampled_from(["x.json", "task", "train", ":", "+", "64", "²", "٣", "0", NUMBER, " "]), max_size=8))
@inputs(700)
def test_calibration_sources(pieces):
    with refused_or_read():
        assert all(source.count > 0 and source.location for source in parse_sources("".join(pieces)))


NAMES = [*ModelArguments.model_fields, "norm", "h0", "max_depth", "beam", "unit", "min_ratio", "percentile_step", "x"]
GIVEN = VALUES | st.integers() | st.floats() | st.sampled_from(["rtn", "awq", "qvlm", "w4a4", "none", "true", NUMBER])


def check_arguments(values):
    with refused_or_read():
        arguments = parse_arguments(values)
        check_request(arguments.method, arguments.scheme, arguments.options)
        backends.kernels(arguments.backend)


@given(st.dictionaries(st.sampled_from(NAMES), GIVEN, max_size=6))
@inputs(700)
def test_model_arguments(values):
    check_arguments({"pretrained": "x", "method": "qvlm"} | values)


@given(st.lists(st.tuples(st.sampled_from(NAMES), GIVEN | st.text(max_size=6)), max_size=4))
@inputs(700)
def test_model_arguments_as_typed(pairs):
    try:
        values = simple_parse_args_string(",".join(f"{name}={value}" for name, value in pairs))
    except Exception:  # lmms-eval's own parser
        return
    check_arguments({"pretrained": "x", "method": "qvlm"} | values)


# Plans


def read_plan(folder, loaded):
    with refused_or_read(), watched(folder):
        plan = RoundingPlan.load(folder)
        check_plan(plan, loaded.model, loaded.fingerprint, backends.kernels("reference"))
        assert plan.facts["plan_hash"] == plan.hash


@pytest.fixture(scope="module")
def plan_files(place, searched):
    folder = searched[1].save(place / "plan")
    return folder, json.loads((folder / "plan.json").read_text()), (folder / "plan.safetensors").read_bytes()


@given(data=st.data())
@inputs(600)
def test_plan_json(plan_files, searched, data):
    folder, header, blob = plan_files
    put(folder / "plan.json", data.draw(texts(header)))
    put(folder / "plan.safetensors", blob)
    read_plan(folder, searched[0])


@given(data=st.data())
@inputs(600)
def test_plan_tensors_with_a_hash_that_fits(plan_files, searched, data):
    folder, header, blob = plan_files
    blob = data.draw(blobs(blob))
    put(folder / "plan.json", json.dumps(header | {"tensors_sha256": hashlib.sha256(blob).hexdigest()}))
    put(folder / "plan.safetensors", blob)
    read_plan(folder, searched[0])


@given(data=st.data())
@inputs(200)
def test_steps_of_a_search(place, data):
    workspace = Workspace(place / "steps")
    workspace.keep("step", {"choices": [{"site": 1}], "error": 0.5}, {"a": torch.ones(4)})
    file = place / "steps" / "step.safetensors"
    put(file, data.draw(blobs(file.read_bytes())))
    workspace.recall("step")


# Quantized checkpoints


@pytest.fixture(scope="module")
def exported(place, searched):
    request = check_request("rtn", "w4a16", {"group_size": 16})
    loaded = load(str(place / "model"), dtype="bfloat16")
    export(rotated(planning.obtain_plan(loaded, request, None, None)), loaded, place / "exported")
    return place / "exported"


@given(data=st.data())
@inputs(600)
def test_checkpoint_records_with_a_hash_that_fits(exported, data):
    whole = json.loads((exported / "config.json").read_text())["quantization_config"]
    stored = [module for module in whole["modules"] if module["kernel"]][:3]
    record = data.draw(edited(whole | {"modules": stored}))
    with contextlib.suppress(ValueError, KeyError, TypeError):
        record["plan"]["table_hash"] = table_hash([ModulePlan(**module["plan"]) for module in record["modules"]])
    if not isinstance(record, dict):  # transformers reads no such thing
        return
    model = nn.Module()
    for module in stored:
        *path, name = module["plan"]["name"].split(".")
        owner = model
        for part in path:
            owner = owner._modules.setdefault(part, nn.Module())
        owner.add_module(name, nn.Linear(*reversed(module["plan"]["shape"]), device="meta"))
    with refused_or_read(), watched(exported):
        read = CheckpointRecord.read(record)
        lay_out(read, model)
        verify_files(read, exported)


@pytest.mark.parametrize("kind", ["exported", "plain", "original"])
@given(data=st.data())
@inputs(15)
def test_configurations_of_whole_folders(place, exported, kind, data):
    if not (folder := place / f"{kind}-folder").exists():
        if kind == "original":
            write_original_llava(folder, layers=1)
        else:
            shutil.copytree(exported if kind == "exported" else place / "model", folder)
        shutil.copy(folder / "config.json", folder / "good.json")
    good = json.loads((folder / "good.json").read_text())
    put(folder / "config.json", data.draw(texts(good, most=2)))
    with refused_or_read(), watched(folder):
        load(str(folder))


# Results


@pytest.fixture(scope="module", autouse=True)
def commit():
    """The page asks git for the commit of this package, which hostile files have no part in."""
    with pytest.MonkeyPatch.context() as patch:
        yield patch.setattr("qvlm_plugin.report.leaderboard.page.source_commit", lambda: None)


@pytest.fixture(scope="module")
def run(place):
    """A results file that may be added to a leaderboard, and the rows of its samples file."""
    scores = [1, 0, 1]
    file = write(place / "results" / "model", content(scores, facts()), samples(scores))
    return file, json.loads(file.read_text()), samples(scores)


def show_everything(folder):
    with refused_or_read():
        results_grid(read_results([folder])).markdown()
    with refused_or_read():
        for samples_read in read_samples(folder):
            check_same_documents(samples_read, samples_read)
            assert samples_read.name
    with refused_or_read():
        board = rank(read_board(find_results_files([folder]), folder))
        html_text(board, [], folder)
        for write_text in (markdown_text, json_text):
            write_text(board, [])
        csv_text(board)


@given(data=st.data())
@inputs(350)
def test_results_files(run, data):
    file, document, _ = run
    put(file, data.draw(texts(document)))
    with watched(file.parents[1]):
        show_everything(file.parents[1])
        finished_cells([Cell("a", {"pretrained": "x"}, ("quiz",))], file.parents[1])


@given(data=st.data())
@inputs(300)
def test_results_added_with_a_seal_that_fits(run, place, data):
    file, document, _ = run
    document = data.draw(edited(document))
    with contextlib.suppress(KeyError, TypeError, AttributeError):
        document["qvlm"]["seal"] = seal(document)
    put(file, json.dumps(document))
    with refused_or_read(), watched(place):
        assert add_run(file, place / "shared").is_relative_to(place / "shared")


@given(data=st.data())
@inputs(350)
def test_samples_files(run, data):
    file, document, rows = run
    put(file, json.dumps(document))
    lines = [json.dumps(rows[0]), data.draw(texts(rows[1])), json.dumps(rows[2])]
    put(next(file.parent.glob("*.jsonl")), "\n".join(lines))
    with watched(file.parents[1]):
        show_everything(file.parents[1])


ANSWERS = [{"question_id": 1, "answer": "red"}, {"question_id": 2, "answer": "blue"}]


@given(texts(ANSWERS) | texts([{"image": f"VizWiz_test_{i:08}.jpg", "answer": "red"} for i in range(2)]))
@inputs(300)
def test_submissions(place, text):
    put(place / "submission.json", text)
    with refused_or_read():
        check_submission(place / "submission.json")


# What is run, and on what

GRID = {
    "models": ["tiny"], "methods": ["rtn", "awq"], "schemes": ["w4a4"], "tasks": ["quiz"], "limit": 4,
    "options": {"awq": {"norm": 2.0}}, "model_args": {"dtype": "float16"},
}  # fmt: skip


@given(texts(GRID) | blobs(yaml.safe_dump(GRID).encode()))
@inputs(150)
def test_grids(place, text):
    put(place / "grid.yaml", text)
    with refused_or_read(), watched(place):
        cells(read_grid(place / "grid.yaml", {}))


TURNS = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "that"}]


@given(texts([{"id": index, "image": "1.png", "conversations": TURNS} for index in range(2)]))
@inputs(300)
def test_conversation_files(place, text):
    random_image(1).save(place / "1.png")
    put(place / "rows.json", text)
    with refused_or_read(), watched(place):
        read_calibration(f"{place / 'rows.json'}:2", None, 0, None).content_hash()


TASK = {
    "task": "quiz", "dataset_path": "lmms-lab-encoder/ScienceQA", "test_split": "test", "output_type": "generate_until",
    "doc_to_text": "{{question}}", "doc_to_target": "answer", "doc_to_choice": "choices",
    "generation_kwargs": {"max_new_tokens": 4}, "metric_list": [{"metric": "exact_match", "aggregation": "mean"}],
    "lmms_eval_specific_kwargs": {"default": {"pre_prompt": ""}}, "metadata": {"version": 1.0},
}  # fmt: skip


@given(data=st.data())
@inputs(30)
def test_task_definitions(mirrors, data):
    put(mirrors / "tasks" / "quiz.yaml", json.dumps(data.draw(edited(TASK, most=2))))
    try:
        manager = TaskManager("ERROR", include_path=str(mirrors / "tasks"), include_defaults=False)
    except Exception:  # lmms-eval's own index
        return
    with pytest.MonkeyPatch.context() as patch, refused_or_read():
        patch.setattr(time, "sleep", lambda seconds: None)  # between lmms-eval's attempts to load data
        patch.setattr(task_source, "_task_manager", lambda: manager)
        task_source.draw_samples("quiz", "train", 1, 0)


@pytest.fixture
def mirrors(place, monkeypatch):
    """The working directory of the harness, with its data sets."""
    if not (place / "tasks").exists():
        (place / "tasks").mkdir()
        write_mirrors(place)
    monkeypatch.chdir(place)
    return place
