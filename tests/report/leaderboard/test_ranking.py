import json
import math
import random
import shutil

import pytest
from report.leaderboard.written import DATA, content, provenance, samples, write, write_run

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.report.leaderboard.ranking import rank
from qvlm_plugin.report.leaderboard.reading import read_board
from qvlm_plugin.report.leaderboard.schema import find_results_files


def board(folder):
    return rank(read_board(find_results_files([folder]), folder))


def by_run(board, metric="exact_match"):
    """Rows by the folder of their file."""
    return {row.file.partition("/")[0]: row for row in board.rows if row.metric == metric}


def test_ranks_are_the_order_of_scores(tmp_path):
    scores = {"none": [1, 1, 1, 1], "a": [1, 1, 0, 0], "b": [1, 1, 1, 0], "c": [1, 0, 1, 0]}
    for name, values in scores.items():
        write_run(tmp_path / name, values, provenance(name, "w16a16" if name == "none" else "w4a4"))
    found = board(tmp_path)
    assert not found.problems
    rows = by_run(found)
    assert {name: row.rank for name, row in rows.items()} == {"none": 1, "b": 2, "a": 3, "c": 3}
    assert [row.rank for row in found.rows] == [1, 2, 3, 3]
    assert rows["none"].difference is None and rows["a"].difference == -0.5 and rows["b"].difference == -0.25
    assert {name: (row.rank_low, row.rank_high) for name, row in rows.items()} == dict.fromkeys(rows, (1, 4))
    assert len({row.evaluation for row in found.rows}) == 1


def test_a_metric_that_should_be_low_ranks_the_lowest_first(tmp_path):
    for name, failures in (("a", 0.5), ("b", 0.1)):
        whole = content([1, 0], provenance(name), metrics={"parse_failure": failures})
        write(tmp_path / name, whole)
    rows = by_run(board(tmp_path), "parse_failure")
    assert (rows["a"].rank, rows["b"].rank) == (2, 1) and not rows["a"].main


@pytest.mark.parametrize(
    "change",
    [
        lambda whole: whole["qvlm"]["data"]["quiz"].update(revision="b" * 40),
        lambda whole: whole["qvlm"]["data"]["quiz"].update(split="validation"),
        lambda whole: whole["qvlm"].update(system_prompt="Be brief."),
        lambda whole: whole["configs"]["quiz"]["lmms_eval_specific_kwargs"].update(post_prompt="!"),
        lambda whole: whole["configs"]["quiz"].update(doc_to_text="<function beg at 0x7f0000000000>"),
        lambda whole: whole["configs"]["quiz"]["generation_kwargs"].update(max_new_tokens=2),
        lambda whole: whole["configs"]["quiz"].update(num_fewshot=3),
        lambda whole: whole["n-samples"]["quiz"].update(original=400),
        lambda whole: whole["config"].update(offset=4),
        lambda whole: whole["versions"].update(quiz=2.0),
    ],
)
def test_different_evaluations_are_not_ranked_together(tmp_path, change):
    write_run(tmp_path / "a", [1, 1, 0, 0], provenance("a"))
    whole = content([1, 1, 1, 0], provenance("b"))
    change(whole)
    del whole["qvlm"]["seal"]
    write(tmp_path / "b", whole, samples([1, 1, 1, 0]))
    rows = by_run(board(tmp_path))
    assert rows["a"].evaluation != rows["b"].evaluation and rows["a"].rank == rows["b"].rank == 1


def test_other_questions_are_another_evaluation_and_another_order_is_not(tmp_path):
    write_run(tmp_path / "a", [1, 1, 0, 0], provenance("a"))
    rows = samples([1, 0, 0, 0])
    write(tmp_path / "b", content([1, 0, 0, 0], provenance("b")), rows[::-1])
    write(tmp_path / "c", content([1, 0, 0, 0], provenance("c")), [row | {"input": "?"} for row in rows])
    write(tmp_path / "d", content([1, 0, 0, 0], provenance("d")), [row | {"target": "?"} for row in rows])
    found = by_run(board(tmp_path))
    assert found["b"].evaluation == found["a"].evaluation and found["b"].rank == 2
    assert len({found[name].evaluation for name in "acd"}) == 3


def test_the_address_of_a_prompt_function_does_not_matter(tmp_path):
    write_run(tmp_path / "a", [1, 0], provenance("a"))
    whole = content([1, 1], provenance("b"))
    whole["configs"]["quiz"]["doc_to_text"] = "<function ask at 0x7fffffffffff>"
    del whole["qvlm"]["seal"]
    write(tmp_path / "b", whole, samples([1, 1]))
    assert by_run(board(tmp_path))["a"].rank == 2


def test_another_packages_model_is_ranked_on_the_same_documents(tmp_path):
    write_run(tmp_path / "ours", [1, 0, 0], provenance())
    write_run(tmp_path / "same", [1, 1, 0])
    write_run(tmp_path / "fewer", [1, 1], total=3)
    write(tmp_path / "silent", content([1, 1, 1]))  # neither samples nor provenance: nobody knows the documents
    rows = by_run(board(tmp_path))
    assert (rows["same"].rank, rows["ours"].rank) == (1, 2) and rows["same"].method is None
    assert rows["fewer"].evaluation != rows["ours"].evaluation and rows["fewer"].apart
    assert rows["silent"].rank is None and rows["silent"].evaluation is None


def test_stand_in_runs_and_others_on_the_same_documents_are_listed_apart(tmp_path):
    origin = DATA | {"origin": "local", "revision": None, "content_hash": "c" * 64, "stand_in": True}
    write_run(tmp_path / "ours", [1, 0, 0], provenance(data={"quiz": origin}, stand_in=True))
    write_run(tmp_path / "other", [1, 1, 0])
    rows = by_run(board(tmp_path))
    assert all(row.apart and "stand-in data" in row.notes for row in rows.values())


def test_runs_without_samples_join_the_only_evaluation_that_agrees(tmp_path):
    write_run(tmp_path / "a", [1, 0, 0], provenance("a"))
    write(tmp_path / "b", content([1, 1, 0], provenance("b")))
    assert {name: row.rank for name, row in by_run(board(tmp_path)).items()} == {"a": 2, "b": 1}
    other = [row | {"input": "?"} for row in samples([1, 1, 1])]  # now two evaluations agree with what b tells
    write(tmp_path / "c", content([1, 1, 1], provenance("c")), other)
    rows = by_run(board(tmp_path))
    assert len({row.evaluation for row in rows.values()}) == 3 and {row.rank for row in rows.values()} == {1}


def test_calibrating_on_evaluated_documents_costs_the_rank(tmp_path):
    write_run(tmp_path / "a", [1, 0], provenance("a"))
    overlapping = {"source": "quiz:test:2", "seed": 0, "documents_compared": 2, "documents_also_evaluated": 2}
    write_run(tmp_path / "b", [1, 1], provenance("b", calibration=overlapping))
    rows = by_run(board(tmp_path))
    assert rows["b"].rank is None and rows["a"].rank == 1


def test_other_arguments_are_another_model(tmp_path):
    for number, resolution in enumerate((336, 448)):
        config = {"model": "other", "model_args": f"size={resolution}"}
        write_run(tmp_path / str(resolution), [1, number], None, config=config, date=f"2026112{number}_120000")
    found = board(tmp_path)
    assert {name: row.rank for name, row in by_run(found).items()} == {"336": 2, "448": 1} and not found.problems


def test_random_boards_are_ranked_as_pairwise_comparison_ranks_them(tmp_path):
    generator = random.Random(0)
    truth = {}
    for index in range(40):
        revision, count = generator.choice("ab") * 40, generator.choice([4, 5])
        values = [generator.randint(0, 1) for _ in range(count)]
        data = {"quiz": DATA | {"revision": revision, "stand_in": False}}
        write_run(tmp_path / str(index), values, provenance(f"m{index}", data=data))
        truth[str(index)] = (revision, count, sum(values) / count)
    for name, row in by_run(board(tmp_path)).items():
        rivals = [other for other in truth.values() if other[:2] == truth[name][:2]]
        assert row.rank == 1 + sum(other[2] > truth[name][2] for other in rivals)


# What is wrong with files is told file by file, and the rest is as if they were not there


@pytest.fixture
def healthy(tmp_path):
    write_run(tmp_path / "good", [1, 1, 0, 0], provenance("good"))
    return tmp_path


def damaged(folder, whole, rows=None):
    return write(folder / "bad", whole, rows)


def truncated(folder):
    file = write_run(folder / "bad", [1, 1, 1, 0], provenance("bad"))
    file.write_text(file.read_text()[:-200])


def failed(folder):
    damaged(folder, content([1], provenance("bad")) | {"results": {}})


def not_a_number(folder):
    whole = content([1, 1, 1, 1], provenance("bad"))
    whole["results"]["quiz"]["exact_match,none"] = math.nan
    del whole["qvlm"]["seal"]
    damaged(folder, whole)


def missing_samples(folder):
    damaged(folder, content([1, 1, 1, 1], provenance("bad")), samples([1, 1, 1]))


def cut_samples(folder):
    file = write_run(folder / "bad", [1, 1, 1, 1], provenance("bad"))
    lines = file.with_name("20261121_120000_samples_quiz.jsonl")
    lines.write_text(lines.read_text()[:-30])


def twice(folder):
    damaged(folder, content([1, 1, 1, 1], provenance("bad")), [*samples([1, 1, 1]), samples([1])[0]])


def nan_sample(folder):
    rows = samples([1, 1, 1, 1])
    rows[0]["exact_match"] = math.nan
    damaged(folder, content([1, 1, 1, 1], provenance("bad")), rows)


def disagreeing(folder):
    damaged(folder, content([1, 1, 1, 1], provenance("bad")), samples([1, 1, 0, 0]))


def edited(folder):
    whole = content([1, 0, 0, 0], provenance("bad"))
    whole["results"]["quiz"]["exact_match,none"] = 1.0
    damaged(folder, whole)


def malformed(folder):
    damaged(folder, content([1], provenance("bad")) | {"n-samples": {"quiz": "many"}})


def a_list(folder):
    damaged(folder, content([1])).write_text("[1, 2]")


def deep(folder):
    damaged(folder, content([1])).write_text("[" * 100_000)


def binary(folder):
    damaged(folder, content([1])).write_bytes(bytes(range(256)))


def odd_task(folder):
    damaged(folder, content([1]) | {"configs": {"quiz": {"lmms_eval_specific_kwargs": "none"}}})


def repeated(folder):
    write_run(folder / "bad", [0, 0, 0, 0], provenance("good"), date="20261120_120000")


def copied(folder):
    shutil.copytree(folder / "good", folder / "worse")


def versions(folder):
    write_run(folder / "worse", [1, 0, 0, 0], provenance("other", versions={"torch": "2.16.0"}))


@pytest.mark.parametrize(
    "harm, message",
    [
        (truncated, "is not a results file of lmms-eval"),
        (failed, "contains no results: the evaluation failed"),
        (not_a_number, "quiz exact_match is nan; left out"),
        (missing_samples, "4 documents were evaluated, but the samples file has 3"),
        (cut_samples, "is not a samples file of lmms-eval: line 4"),
        (twice, "has document 0 twice"),
        (nan_sample, "has a score that is not finite: exact_match"),
        (disagreeing, "exact_match is 1, but the samples' mean is 0.5"),
        (edited, "was edited after the run"),
        (malformed, "is not a results file of lmms-eval: n-samples.quiz"),
        (odd_task, "is not a results file of lmms-eval: configs.quiz"),
        (a_list, "is not a results file of lmms-eval"),
        (deep, "is not a results file of lmms-eval"),
        (binary, "is not a results file of lmms-eval"),
        (
            repeated,
            "repeats good/20261121_120000_results.json, which is shown instead, with another result: quiz exact",
        ),
        (copied, "is a copy of good/20261121_120000_results.json"),
        (versions, "quiz: other versions than in other runs: torch 2.1"),
    ],
)
def test_bad_files_are_reported_and_never_ranked(healthy, harm, message):
    harm(healthy)
    found = board(healthy)
    assert any(message in problem.message for problem in found.problems)
    assert all("\n" not in problem.message for problem in found.problems)
    assert by_run(found)["good"].rank == 1
    assert {name for name, row in by_run(found).items() if row.rank} <= {"good", "worse"}


def test_paths(tmp_path):
    with pytest.raises(QVLMError, match="missing does not exist"):
        find_results_files([tmp_path / "missing"])
    with pytest.raises(QVLMError, match=r"contains no \*_results\.json"):
        find_results_files([tmp_path])
    file = write_run(tmp_path / "a", [1])
    assert find_results_files([tmp_path, file, tmp_path / "a"]) == [file]
    assert json.loads(file.read_text())["model_name"] == "org/model"
