"""Real runs of the harness's command line: a tiny model, and the unmodified standard tasks on tiny local mirrors."""

import json
import subprocess
from pathlib import Path

import pytest
import yaml
from harness.mirrors import environment_in, scienceqa_row, write_conversations, write_mirrors
from tiny_llava import write_tiny_llava

from qvlm_plugin.models.loading import load
from qvlm_plugin.plan_request import check_request
from qvlm_plugin.planning import obtain_plan
from qvlm_plugin.report.leaderboard.write import write_leaderboard
from qvlm_plugin.report.seal import seal
from qvlm_plugin.report.submission import check_submission

STANDARD = "scienceqa,vizwiz_vqa_val,vqav2_val"
SECRET = "vizwiz_vqa_test,vqav2_test"
CHOICES = """
task: sqa_choices
dataset_path: lmms-lab-encoder/ScienceQA
dataset_name: ScienceQA-FULL
test_split: test
output_type: multiple_choice
doc_to_visual: !function lmms_eval.tasks.scienceqa.utils.sqa_doc_to_visual
doc_to_text: "{{question}}"
doc_to_target: answer
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
TASK_FOLDER = Path(__file__).parents[2] / "tasks"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working directory with mirrors, a model, a saved plan, and a calibration file of two evaluated documents."""
    directory = write_mirrors(tmp_path_factory.mktemp("runs"))
    write_tiny_llava(directory / "tiny")
    loaded = load(str(directory / "tiny"), dtype="float32")
    obtain_plan(loaded, check_request("rtn", "w3a16", {"group_size": 16}), None, None).save(directory / "plan")
    (directory / "more-tasks").mkdir()
    (directory / "more-tasks" / "sqa_choices.yaml").write_text(CHOICES)
    write_conversations(directory / "evaluated.json", range(2), directory)
    return directory


@pytest.fixture(scope="module")
def run(place, programs):
    """Runs a module as a command there; returns what it printed."""

    def run(*command):
        command, environment = [programs / "python", "-m", *command], environment_in(place)
        done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    return run


def results_of(place, folder):
    found = sorted((place / folder).rglob("*_results.json"))
    return json.loads(found[0].read_text()) if found else None


def answers_of(place, folder):
    """Every logged answer by task and document."""
    lines = [
        (file.name.split("_samples_")[1], json.loads(line))
        for file in (place / folder).rglob("*_samples_*.jsonl")
        for line in file.read_text().splitlines()
    ]
    return {(name, line["doc_id"]): line["filtered_resps"] for name, line in lines}


def arguments(**values):
    return ",".join(f"{name}={value}" for name, value in {"pretrained": "tiny", "dtype": "float32", **values}.items())


@pytest.fixture(scope="module")
def full_precision(place, run):
    """A run as a user types it: chat format, full precision."""
    command = ["lmms_eval", "--model", "qvlm_llava", "--model_args", arguments(), "--tasks", STANDARD]
    run(*command, "--batch_size", "4", "--output_path", "full", "--log_samples")
    return results_of(place, "full")


def test_full_precision(full_precision):
    scores, qvlm = full_precision["results"], full_precision["qvlm"]
    assert {"scienceqa", "vizwiz_vqa_val", "vqav2_val"} <= scores.keys()
    assert all(0 <= scores[task]["exact_match,none"] <= 1 for task in STANDARD.split(","))
    assert (qvlm["method"], qvlm["prompt_format"], qvlm["calibration"]) == ("none", "chat", None)
    assert qvlm["bits"]["decoder"] == {"weight": 16, "activation": 16}
    assert {task: counts["generated"] for task, counts in qvlm["answers"].items()} == {
        "scienceqa": 9,
        "vizwiz_vqa_val": 5,
        "vqav2_val": 6,
    }
    assert qvlm["answers"]["scienceqa"]["parse_failures"] == 9  # a random model does not answer in letters
    for task, data in qvlm["data"].items():
        assert data["origin"] == "local" and data["stand_in"] and len(data["content_hash"]) == 64, task
    assert qvlm["stand_in"] is True
    assert qvlm["weight_bytes"] > 200_000 and qvlm["peak_memory_bytes"] > 10**8 and qvlm["processes"] == 1
    assert qvlm["image_processor"] == "CLIPImageProcessorPil"
    assert (qvlm["context_length"], set(qvlm["prompts_over_context"].values())) == (512, {0})
    assert {"torch", "transformers", "lmms_eval", "qvlm_plugin", "datasets"} <= qvlm["versions"].keys()
    throughput = full_precision["throughput"]
    assert throughput["total_gen_tokens"] > 0 and throughput["total_elapsed_time"] > 0
    assert throughput["avg_qvlm_weight_bytes"] == qvlm["weight_bytes"]
    latency = qvlm["latency"]
    assert latency["requests"] == 20 and throughput["avg_latency"] == throughput["total_elapsed_time"] / 20
    assert throughput["avg_qvlm_time_to_first_token"] == latency["time_to_first_token"]["mean"] > 0
    assert throughput["avg_qvlm_time_per_output_token"] == latency["time_per_output_token"]["mean"] > 0
    efficiency = full_precision["efficiency"]["overall"]
    assert efficiency["docs_with_token_counts"] == efficiency["docs"] == 20
    assert efficiency["total_output_tokens"] == throughput["total_gen_tokens"]


RTN = {
    "method": "rtn", "scheme": "w4a4", "calibration": "scienceqa:train:5+vqav2_val:train:2", "seed": 3,
    "calibration_batch_size": 7,
}  # fmt: skip


@pytest.fixture(scope="module")
def printed(place, run):
    """Several runs in one process; what it printed."""
    overlapping = {
        "method": "rtn", "scheme": "w8a8", "calibration": "evaluated.json:2", "cache": "none",
        "calibration_batch_size": 2,
    }  # fmt: skip
    common = {"model": "qvlm_llava", "tasks": STANDARD, "batch_size": "3", "log_samples": True}
    runs = [
        common | {"model_args": arguments(**RTN), "force_simple": True, "output_path": "rtn", "use_cache": "responses"},
        common | {"model": "dummy", "model_args": "", "force_simple": True, "output_path": "dummy"},
        common
        | {"model_args": arguments(plan="plan"), "output_path": "plan", "tasks": f"qvlm,{STANDARD},{SECRET}"}
        | {"limit": 4.0, "gen_kwargs": "max_new_tokens=8"},
        common | {"model_args": arguments(**overlapping), "output_path": "refused"},
        common | {"model_args": arguments(**overlapping, allow_overlap="true"), "output_path": "allowed"},
        common
        | {"model_args": arguments(), "force_simple": True, "output_path": "choices", "tasks": "sqa_choices"}
        | {"include_path": "more-tasks"},
        common | {"model_args": arguments(colour="red"), "output_path": "unknown"},
    ]
    (place / "runs.yaml").write_text(yaml.safe_dump([{"include_path": str(TASK_FOLDER)} | one for one in runs]))
    return run("lmms_eval", "--config", "runs.yaml")


def test_several_runs_in_one_process(place, full_precision, printed):
    """Each run's results carry that run's provenance, another model's carry none, and refused runs write nothing."""
    qvlm = results_of(place, "rtn")["qvlm"]
    assert (qvlm["method"], qvlm["scheme"], qvlm["prompt_format"]) == ("rtn", "w4a4", "simple")
    assert 4 < qvlm["bits"]["decoder"]["weight"] < 6 and qvlm["bits"]["vision"]["activation"] == 4
    assert qvlm["calibration"] == {
        "source": RTN["calibration"],
        "seed": 3,
        "documents": 7,
        "conv": "the checkpoint's own",
        "over_context": 0,
        "documents_compared": 20,
        "documents_also_evaluated": 0,
    }
    assert qvlm["search_seconds"] > 0
    assert len({qvlm["plan_hash"], qvlm["table_hash"], full_precision["qvlm"]["plan_hash"]}) == 3
    assert answers_of(place, "rtn").keys() == answers_of(place, "full").keys()
    assert answers_of(place, "rtn") != answers_of(place, "full")
    assert list((place / "responses").rglob("cache.db"))

    assert "qvlm" not in results_of(place, "dummy")

    planned = results_of(place, "plan")
    assert (planned["qvlm"]["scheme"], planned["qvlm"]["calibration"]) == ("w3a16", None)
    assert planned["qvlm"]["options"]["group_size"] == 16
    answers = answers_of(place, "plan")
    for ours, standard in zip(("qvlm_scienceqa", "qvlm_vizwiz", "qvlm_vqav2"), STANDARD.split(","), strict=True):
        assert planned["results"][ours]["exact_match,none"] == planned["results"][standard]["exact_match,none"]
        found = [[answers[f"{task}.jsonl", index] for index in range(4)] for task in (ours, standard)]
        assert found[0] == found[1]
    science = planned["results"]["qvlm_scienceqa"]
    assert science["parse_failure,none"] == 1 and {"NAT,none", "SOC,none", "IMG,none", "G1-6,none"} <= science.keys()
    assert "G7-12,none" not in science  # none of the four is from there
    assert planned["results"]["qvlm_scienceqa_lepa"]["parse_failure,none"] == 1
    assert planned["qvlm"]["answers"]["qvlm_scienceqa_lepa"] == {
        "generated": 4,
        "found_in_cache": 0,
        "parse_failures": 4,
    }

    checked = [check_submission(file) for file in sorted((place / "plan" / "submissions").iterdir())]
    assert [(found.benchmark, count) for found, count in checked] == [("VizWiz-VQA", 3), ("VQA-v2", 4)]

    assert results_of(place, "refused") is None
    assert "2 of the documents to evaluate are in the calibration set, for example document 0 of" in printed
    assert results_of(place, "allowed")["qvlm"]["calibration"]["documents_also_evaluated"] == 2
    choices = results_of(place, "choices")  # the likeliest choice, given the image, is the answer
    assert choices["n-samples"]["sqa_choices"]["effective"] == 9 and choices["qvlm"]["answers"] == {}
    scores = [[float(score) for score, _ in one] for _, one in sorted(answers_of(place, "choices").items())]
    assert all(score < 0 for one in scores for score in one) and {len(one) for one in scores} == {2, 3}
    right = [one.index(max(one)) == scienceqa_row(index)["answer"] for index, one in enumerate(scores)]
    assert choices["results"]["sqa_choices"]["acc,none"] == pytest.approx(sum(right) / 9) and any(right)
    assert results_of(place, "unknown") is None and "unknown model argument 'colour'; allowed are" in printed


def test_their_leaderboard(place, full_precision, printed, tmp_path):
    """Real results, ours and another model's: ranked where the documents are the same, and marked as stand-ins."""
    board = write_leaderboard([place], tmp_path, with_reported=False)
    assert not board.problems
    rows = {(row.task, row.method, row.scheme, row.documents): row for row in board.rows if row.metric == "exact_match"}
    whole = [rows["scienceqa", *run, 9] for run in ((None, None), ("none", "w16a16"), ("rtn", "w4a4"))]
    refused, part = rows["scienceqa", "rtn", "w8a8", 9], rows["scienceqa", "rtn", "w3a16", 4]
    assert len({row.evaluation for row in (*whole, refused)}) == 1 and part.evaluation != whole[0].evaluation
    assert all(row.rank and "stand-in data" in row.notes for row in whole) and refused.rank is None
    assert whole[2].difference == whole[2].value - whole[1].value
    assert all((tmp_path / row.samples).is_file() for row in whole)
    content = results_of(place, "full")
    assert content["qvlm"]["seal"] == seal(content)
    content["results"]["scienceqa"]["exact_match,none"] += 0.01
    assert content["qvlm"]["seal"] != seal(content)


def test_two_processes(place, run, printed):
    """Sharded under torchrun: one search for both, each document once, and the plan and answers of a single process."""
    torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "lmms_eval"]
    model = ["--model", "qvlm_llava", "--model_args", arguments(**RTN, cache="other"), "--force_simple"]
    run(*torchrun, *model, "--tasks", STANDARD, "--batch_size", "4", "--output_path", "two", "--log_samples")
    alone, together = (results_of(place, folder) for folder in ("rtn", "two"))
    assert together["qvlm"]["processes"] == 2
    assert together["qvlm"]["plan_hash"] == alone["qvlm"]["plan_hash"]
    assert together["qvlm"]["answers"] == alone["qvlm"]["answers"]
    assert together["qvlm"]["calibration"] == alone["qvlm"]["calibration"]
    assert answers_of(place, "two") == answers_of(place, "rtn")
    assert [path for path in (place / "other").iterdir() if path.is_dir()]
