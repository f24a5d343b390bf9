import json
import subprocess

import pytest
import yaml
from harness.mirrors import environment_in, write_mirrors
from report.logged import sample, scored, write_run
from tiny_llava import write_tiny_llava

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.report.samples import check_same_documents, read_samples


def read(folder):
    (run,) = read_samples(folder)
    return run


def test_documents_are_read_as_logged(tmp_path):
    rows = [
        sample(2, 0.3, " blue\u2028green\r\n", target=7, question="what?", acc_NAT=True, submission={"image": "2.jpg"}),
        sample(0, 1),
    ]
    file = write_run(tmp_path, {"quiz_2": rows}, qvlm={"method": "rtn", "scheme": "w4a4"})
    run = read(tmp_path)
    assert (run.file, run.name) == (file, "rtn w4a4") and run == read(file)
    first, second = run.tasks["quiz_2"]
    assert (first.id, first.target, first.input, first.answer, first.image) == (0, "red", "question 0", "red", "")
    assert (second.id, second.target, second.input, second.answer) == (2, "7", "what?", "blue\u2028green")
    assert first.metrics == {"exact_match": 1.0} and second.metrics == {"exact_match": 0.3, "acc_NAT": 1.0}


def test_a_record_counts_by_its_score_and_totals_are_detected(tmp_path):
    """The results say 0.5 of exact_match: the mean of the one task's records, and not of the other's."""
    scores = {"mean": [1, 0, 0, 1], "total": [1, 1, 0, 1]}
    tasks = {
        task: [sample(index, {"category": "x", "score": one}) for index, one in enumerate(found)]
        for task, found in scores.items()
    }
    write_run(tmp_path, tasks | {"none": [sample(0, {"answer": "red"})], "plain": scored([1, 1])})
    run = read(tmp_path)
    assert [one.metrics["exact_match"] for one in run.tasks["total"]] == [1, 1, 0, 1]
    assert run.totals == {("total", "exact_match"): 0.5}
    assert run.tasks["none"][0].metrics == {} and run.tasks["none"][0].records == {"exact_match"}
    assert not run.tasks["plain"][0].records


def test_images_recorded_by_the_harness_are_distinguished(tmp_path):
    media = [["a.png"], ["b.png"], ["a.png"], ["a.png", "b.png"]]
    write_run(tmp_path, {"quiz": [sample(index, 1, input_media=one) for index, one in enumerate(media)]})
    images = [document.image for document in read(tmp_path).tasks["quiz"]]
    assert images[0] == images[2] and len(set(images)) == 3 and None not in images


def test_the_answer_of_a_multiple_choice_is_the_likeliest(tmp_path):
    choices = [(-3.5, False), (-0.25, True), (-12.0, False)]
    write_run(tmp_path, {"quiz": [sample(0, 1, metric="acc") | {"resps": [choices], "filtered_resps": choices}]})
    (document,) = read(tmp_path).tasks["quiz"]
    assert document.answer == "1" and document.metrics == {"acc": 1.0}


def test_only_the_samples_of_the_same_run_are_read(tmp_path):
    write_run(tmp_path, {"quiz": scored([1, 0])}, stamp="1")
    write_run(tmp_path, {"quiz": scored([0, 0, 0]), "other": scored([1])}, stamp="2")
    assert [{task: len(rows) for task, rows in run.tasks.items()} for run in read_samples(tmp_path)] == [
        {"quiz": 2},
        {"other": 1, "quiz": 3},
    ]


def test_a_run_of_another_package_is_named_after_its_model(tmp_path):
    write_run(tmp_path, {"quiz": scored([1])})
    assert read(tmp_path).name == "model"


def test_a_run_without_samples_explains_how_to_log_them(tmp_path):
    write_run(tmp_path, {"quiz": scored([1])}, log_samples=False)
    with pytest.raises(QVLMError, match=r"_results\.json: no 20261121_120000_samples_\*.*--log_samples"):
        read_samples(tmp_path)


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"doc_id": 0, "targ', "line 2"),
        ('{"doc_id": 1, "target": "x", "input": "y"}', "line 2.*filtered_resps"),
        ("[1]", "line 2"),
        ('{"doc_id": 0, "target": "x", "input": "y", "filtered_resps": "z"}', "document 0 twice"),
    ],
)
def test_broken_samples_are_named(tmp_path, text, message):
    file = write_run(tmp_path, {"quiz": scored([1])})
    (samples,) = file.parent.glob("*.jsonl")
    samples.write_text(samples.read_text() + text)
    with pytest.raises(QVLMError, match=rf"_samples_quiz\.jsonl .*{message}"):
        read_samples(tmp_path)


def test_the_order_of_the_lines_does_not_matter(tmp_path):
    rows = scored([1, 0, 1])
    write_run(tmp_path / "a", {"quiz": rows})
    write_run(tmp_path / "b", {"quiz": scored([1, 0, 1])[::-1]})
    one, other = read(tmp_path / "a"), read(tmp_path / "b")
    check_same_documents(one, other)
    assert one.tasks == other.tasks


def test_unrecorded_images_are_unknown_unless_all_were_seen(tmp_path):
    rows = [sample(0, 1, input_media=["a.png"]), {k: v for k, v in sample(1, 1).items() if k != "input_media"}]
    answers = [{}, {"generated": 1}, {"generated": 2}, {"generated": 1, "found_in_cache": 1}]
    told = []
    for index, counts in enumerate(answers):
        facts = {"method": "rtn", "scheme": "w4a4", "answers": {"quiz": counts} if counts else {}}
        write_run(tmp_path / str(index), {"quiz": [dict(row) for row in rows]}, qvlm=facts)
        told.append(read(tmp_path / str(index)).tasks["quiz"][1].image)
    assert told == [None, None, "", ""]


@pytest.mark.parametrize(
    "tasks, message",
    [
        ({"quiz": scored([1, 0]), "more": scored([1])}, "only one of them has samples of more"),
        ({"quiz": scored([1, 0, 1])}, "documents of task quiz: 1 are in only one of them, for example document 2"),
        (
            {"quiz": [sample(0, 1, input_media=["a.png"]), sample(1, 1, target="blue")]},
            "the target of document 1 of task quiz differs",
        ),
        ({"quiz": [sample(0, 1, question="why?"), sample(1, 1)]}, "the input of document 0 of task quiz differs"),
        ({"quiz": [sample(0, 1, input_media=["b.png"]), sample(1, 1)]}, "the image of document 0 of task quiz differs"),
    ],
)
def test_runs_over_other_documents_are_refused(tmp_path, tasks, message):
    write_run(tmp_path / "a", {"quiz": [sample(0, 1, input_media=["a.png"]), sample(1, 0)]})
    write_run(tmp_path / "b", tasks)
    with pytest.raises(QVLMError, match=message):
        check_same_documents(read(tmp_path / "a"), read(tmp_path / "b"))


def test_a_run_of_the_harness_is_read(tmp_path, programs):
    """What it logs gives its own scores back, and questions about one image can be told."""
    write_mirrors(tmp_path)
    write_tiny_llava(tmp_path / "tiny")
    (tmp_path / "tasks").mkdir()
    choices = {
        "task": "choices",
        "dataset_path": "lmms-lab-encoder/VQAv2",
        "test_split": "validation",
        "output_type": "multiple_choice",
        "doc_to_visual": "FUNCTION",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{question_id % 3}}",
        "doc_to_choice": ["red", "blue", "a green one"],
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    function = "!function lmms_eval.tasks.vqav2.utils.vqav2_doc_to_visual"
    (tmp_path / "tasks" / "choices.yaml").write_text(yaml.safe_dump(choices).replace("FUNCTION", function))
    command = ["--model", "qvlm_llava", "--model_args", "pretrained=tiny,dtype=float32", "--include_path", "tasks"]
    command += ["--tasks", "choices,scienceqa,vizwiz_vqa_val,vqav2_val", "--batch_size", "4"]
    command += ["--output_path", "out", "--log_samples", "--force_simple"]
    done = subprocess.run(
        [programs / "lmms-eval", *command], cwd=tmp_path, env=environment_in(tmp_path), capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    run = read(tmp_path / "out")
    assert run.name == "none w16a16"
    assert {task: [row.id for row in rows] for task, rows in run.tasks.items()} == {
        "choices": list(range(6)),
        "scienceqa": list(range(9)),
        "vizwiz_vqa_val": list(range(5)),
        "vqav2_val": list(range(6)),
    }
    for task, metrics in json.loads(run.file.read_text())["results"].items():
        metric = "acc" if task == "choices" else "exact_match"
        values = [row.metrics[metric] for row in run.tasks[task]]
        assert sum(values) / len(values) == pytest.approx(metrics[f"{metric},none"])
        assert all(row.input and row.answer for row in run.tasks[task])
    assert [row.image == "" for row in run.tasks["scienceqa"]] == [index % 3 == 0 for index in range(9)]
    pictures = [[row.image for row in run.tasks[task]] for task in ("choices", "vqav2_val")]
    assert pictures[0] == pictures[1] and len(set(pictures[0]) - {None}) == 6
    right = [row.answer == row.target for row in run.tasks["choices"]]
    assert right == [row.metrics["acc"] == 1 for row in run.tasks["choices"]] and 0 < sum(right) < 6
    assert run.tasks["scienceqa"][0].input.startswith("Which object is shown as number 0?\nA. a key")
