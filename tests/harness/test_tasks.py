"""Eight more tasks of the harness, unmodified, on tiny mirrors of their data: scores as their papers define them."""

import json
import math
import re
import subprocess
from collections import Counter, defaultdict
from dataclasses import replace
from statistics import mean

import pytest
import yaml
from harness.mirrors import environment_in
from harness.task_mirrors import (
    ai2d_row,
    chartqa_row,
    gqa_row,
    mme_row,
    mmmu_row,
    pope_row,
    seed_row,
    textvqa_row,
    write_answering_llava,
    write_task_mirrors,
)

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.report.leaderboard.write import write_leaderboard
from qvlm_plugin.report.paired import compare
from qvlm_plugin.report.paired_table import paired_notes
from qvlm_plugin.report.pooled import pool, verdict
from qvlm_plugin.report.samples import read_samples

WORDS = "textvqa_val,gqa,pope,mme"
LETTERS = "mmmu_val,chartqa,ai2d,seedbench"
RTN = ",method=rtn,scheme=w2a16"


@pytest.fixture(scope="module")
def place(tmp_path_factory, programs):
    """A working directory with results: of a model in full precision and at 2 bits, and by likelihood."""
    place = write_task_mirrors(tmp_path_factory.mktemp("tasks"))
    write_answering_llava(place / "words", ("yes", "no"))
    write_answering_llava(place / "letters", ("A", "B"), ("red", "7"))
    common = {"model": "qvlm_llava", "batch_size": "4", "log_samples": True}
    runs = [
        common
        | {"tasks": tasks, "model_args": f"pretrained={model},dtype=float32{more}", "output_path": f"{model}{path}"}
        | {"gen_kwargs": "max_new_tokens=1"}
        for more, path in (("", ""), (RTN, "-rtn"))
        for model, tasks in (("words", WORDS), ("letters", LETTERS))
    ]
    scored = {"tasks": "seedbench_ppl", "model_args": "pretrained=letters,dtype=float32"}
    runs += [common | scored | {"output_path": "refused"}]
    runs += [common | scored | {"output_path": "likelihood", "force_simple": True}]
    (place / "runs.yaml").write_text(yaml.safe_dump(runs))
    command = [programs / "python", "-m", "lmms_eval", "--config", "runs.yaml"]
    done = subprocess.run(command, cwd=place, env=environment_in(place), capture_output=True, text=True, timeout=600)
    (place / "log.txt").write_text(done.stdout + done.stderr)
    return place


@pytest.fixture(scope="module")
def scores(place):
    """By task the scores in full precision, by metric."""
    files = [file for model in ("words", "letters", "likelihood") for file in (place / model).rglob("*_results.json")]
    found = {task: values for file in files for task, values in json.loads(file.read_text())["results"].items()}
    return {
        task: {name.split(",")[0]: value for name, value in values.items() if "_stderr" not in name}
        for task, values in found.items()
    }


@pytest.fixture(scope="module")
def samples(place):
    """By task what was logged of its documents, in their order."""
    found = {}
    for model in ("words", "letters", "likelihood"):
        for file in (place / model).rglob("*_samples_*.jsonl"):
            rows = sorted(map(json.loads, file.read_text().splitlines()), key=lambda row: row["doc_id"])
            found[file.stem.split("_samples_")[1]] = rows
    return found


@pytest.fixture(scope="module")
def answers(samples):
    return {task: [row["filtered_resps"] for row in rows] for task, rows in samples.items()}


def documents(row, answers):
    """Each document with its answer."""
    return [(row(index), answer) for index, answer in enumerate(answers)]


def test_answers_differ_and_all_documents_are_answered(answers):
    counts = {task: Counter(map(str, found)) for task, found in answers.items()}
    assert {task: sum(found.values()) for task, found in counts.items()} == {
        "textvqa_val": 8, "gqa": 8, "pope": 12, "mme": 12, "mmmu_val": 12, "chartqa": 12, "ai2d": 8, "seedbench": 9,
        "seedbench_ppl": 9,
    }  # fmt: skip
    assert all(len(found) > 1 for found in counts.values()), counts


def test_yes_and_no(scores, answers):
    right = [answer == doc["answer"] for doc, answer in documents(gqa_row, answers["gqa"])]
    assert scores["gqa"]["exact_match"] == pytest.approx(mean(right))
    pope = documents(pope_row, answers["pope"])
    pairs = Counter((doc["answer"], answer) for doc, answer in pope)
    precision = pairs["yes", "yes"] / (pairs["yes", "yes"] + pairs["no", "yes"])
    recall = pairs["yes", "yes"] / (pairs["yes", "yes"] + pairs["yes", "no"])
    assert scores["pope"]["pope_accuracy"] == pytest.approx((pairs["yes", "yes"] + pairs["no", "no"]) / 12)
    assert scores["pope"]["pope_precision"] == pytest.approx(precision)
    assert scores["pope"]["pope_recall"] == pytest.approx(recall)
    assert scores["pope"]["pope_f1_score"] == pytest.approx(2 * precision * recall / (precision + recall))


def test_soft_scores(scores, answers):
    soft = []
    for doc, answer in documents(textvqa_row, answers["textvqa_val"]):
        count = doc["answers"].count(answer)  # of ten people; one is left out by turns
        soft.append((count * min(1, (count - 1) / 3) + (10 - count) * min(1, count / 3)) / 10)
    assert len(set(soft)) > 1 and scores["textvqa_val"]["exact_match"] == pytest.approx(mean(soft))


def test_scores_above_1(scores, answers):
    """MME's of a category: the percentage of right answers, and that of images with both right."""
    right = defaultdict(lambda: defaultdict(list))
    for doc, answer in documents(mme_row, answers["mme"]):
        right[doc["category"]][doc["question_id"]].append(answer == doc["answer"].lower())
    category = {name: 100 * mean(mean(two) + all(two) for two in images.values()) for name, images in right.items()}
    assert scores["mme"]["mme_perception_score"] == pytest.approx(category["existence"] + category["OCR"])
    assert scores["mme"]["mme_cognition_score"] == pytest.approx(category["code_reasoning"])
    assert scores["mme"]["mme_perception_score"] > 1


def test_relaxed_numbers(scores, answers):
    found = documents(chartqa_row, answers["chartqa"])
    right = [(doc["type"], answer == {"7.2": "7"}.get(doc["answer"], doc["answer"])) for doc, answer in found]
    assert scores["chartqa"]["relaxed_overall"] == pytest.approx(mean(one for _, one in right))
    human = mean(one for kind, one in right if kind == "human_test")
    assert scores["chartqa"]["relaxed_human_split"] == pytest.approx(human)


def test_letters(scores, answers):
    right = [answer == "AB"[int(doc["answer"])] for doc, answer in documents(ai2d_row, answers["ai2d"])]
    assert scores["ai2d"]["exact_match"] == pytest.approx(mean(right)) and any(right)


def test_several_images(scores, samples, answers):
    """Each image is where the text names it, and takes its four tokens; a token is a byte."""
    for index, row in enumerate(samples["mmmu_val"]):
        texts = re.split(r"<image \d>", row["input"])
        assert len(texts) == 2 + index % 3
        size = len("USER:" + "".join(text.strip() for text in texts) + "\nASSISTANT:")
        assert row["token_counts"][0]["input_tokens"] == size + 4 * (len(texts) - 1)
    for doc, row in zip(map(seed_row, range(9)), samples["seedbench"], strict=True):
        size = len("USER:" + row["input"] + "\nASSISTANT:")
        assert row["token_counts"][0]["input_tokens"] == size + 4 * len(doc["image"])
    mmmu = documents(mmmu_row, answers["mmmu_val"])
    sure = [answer == doc["answer"] for doc, answer in mmmu if answer in "AB" or doc["question_type"] == "open"]
    assert sum(sure) <= 12 * scores["mmmu_val"]["mmmu_acc"] + 1e-3 <= sum(sure) + 12 - len(sure)  # or it guesses
    right = [
        (doc["data_type"], answer[0] == doc["answer"]) for doc, answer in documents(seed_row, answers["seedbench"])
    ]
    assert scores["seedbench"]["seed_all"] == pytest.approx(mean(one for _, one in right))
    for kind in ("image", "video"):
        assert scores["seedbench"][f"seed_{kind}"] == pytest.approx(mean(one for of, one in right if of == kind))


def test_likelihood(place, scores, answers):
    """Of four choices the likeliest, shown one image or the eight frames of a video; in the simple format only."""
    likelihoods = [[float(value) for value, _ in choices] for choices in answers["seedbench_ppl"]]
    assert all(len(set(choices)) > 1 and max(choices) < 0 for choices in likelihoods)
    likeliest = [choices.index(max(choices)) for choices in likelihoods]
    right = [likeliest[index] == "AB".index(seed_row(index)["answer"]) for index in range(9)]
    assert scores["seedbench_ppl"]["acc"] == pytest.approx(mean(right))
    assert not (place / "refused").exists()
    assert (
        "task seedbench_ppl scores by likelihood, which lmms-eval supports in its simple format only"
        in (place / "log.txt").read_text()
    )


def pair(place, model, task):
    """A task of the full-precision run and of that at 2 bits."""
    ((one,), (other,)) = (read_samples(place / folder) for folder in (model, f"{model}-rtn"))
    return [replace(run, tasks={task: run.tasks[task]}) for run in (one, other)]


@pytest.mark.parametrize(
    "model, task, metric",
    [
        ("words", "textvqa_val", "exact_match"), ("words", "pope", "pope_accuracy"),
        ("letters", "mmmu_val", "mmmu_acc"), ("letters", "seedbench", "seed_all"),
        ("letters", "seedbench", "seed_video"), ("letters", "chartqa", "relaxed_overall"),
    ],
)  # fmt: skip
def test_documents_scores_pair_and_have_the_tasks_score_for_their_mean(place, scores, model, task, metric):
    baseline, other = pair(place, model, task)
    (row,) = compare(baseline, other, metric)
    assert not row.total and row.baseline.value == pytest.approx(scores[task][metric], abs=1e-5)
    assert row.flips.changed > 0 and row.difference.value == pytest.approx(row.score.value - row.baseline.value)


def test_a_score_of_all_documents_at_once_pairs_by_the_documents_own(place, scores):
    baseline, other = pair(place, "words", "mme")
    (row,) = compare(baseline, other, "mme_perception_score")
    assert row.total and row.baseline.value == scores["mme"]["mme_perception_score"] and row.scale == 1
    own = [one.metrics.get("mme_perception_score") for one in baseline.tasks["mme"]]
    assert {*own} == {0, 1, None} and row.documents == 8 and row.clusters == 4  # two questions about each image
    assert math.isnan(row.difference.error) and 0 < row.p <= 1
    notes = paired_notes(baseline, [row], "mme_perception_score")
    assert any(note.startswith("mme: mme_perception_score is computed from all documents at once") for note in notes)
    (pooled,) = pool([(baseline, other), (baseline, other)], "mme_perception_score")
    assert pooled.score.value == row.score.value and pooled.t_p == pooled.sign_flip_p == row.p
    assert "[" not in verdict(pooled, "rtn", "none")
    (precision,) = compare(*pair(place, "words", "pope"), "pope_precision")
    assert precision.total and precision.baseline.value == pytest.approx(scores["pope"]["pope_precision"])


def test_records_without_a_score_are_refused_in_one_line(place):
    with pytest.raises(QVLMError, match="logs submission without a score for each document, so it cannot be paired"):
        compare(*pair(place, "words", "textvqa_val"), "submission")


def test_the_leaderboard_takes_all_of_them(place, tmp_path):
    runs = [place / name for name in ("words", "words-rtn", "letters", "letters-rtn")]
    board = write_leaderboard(runs, tmp_path, with_reported=False)
    rows = {(row.task, row.metric, row.method): row for row in board.rows if row.main}
    mme = [rows["mme", "mme_perception_score", method] for method in ("none", "rtn")]
    assert not mme[0].percent and {row.rank for row in mme} <= {1, 2} and mme[0].rank_low is None
    assert mme[1].difference == mme[1].value - mme[0].value
    assert rows["pope", "pope_accuracy", "none"].rank_low == 1  # by the documents' scores
    assert {task for task, _, _ in rows} == set(f"{WORDS},{LETTERS}".split(","))
    assert not [problem for problem in board.problems if "versions" not in problem.message]
