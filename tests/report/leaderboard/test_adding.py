import json

import pytest
from report.leaderboard.written import content, provenance, samples, write, write_run

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.report.leaderboard.adding import add_run
from qvlm_plugin.report.leaderboard.ranking import rank
from qvlm_plugin.report.leaderboard.reading import read_board
from qvlm_plugin.report.leaderboard.schema import find_results_files

HASHES = {"plan_hash": "1" * 64, "table_hash": "2" * 64, "model_fingerprint": "3" * 64}


def facts(method="rtn", **changes):
    calibration = {"source": "x:train:4", "seed": 0, "documents_compared": 4, "documents_also_evaluated": 0}
    return provenance(method, **{**HASHES, "calibration": calibration, **changes})


def test_a_run_is_added_once_and_reads_as_before(tmp_path):
    file = write_run(tmp_path / "here", [1, 1, 0], facts())
    copy = add_run(file, tmp_path / "shared")
    assert copy.is_relative_to(tmp_path / "shared") and copy.read_bytes() == file.read_bytes()
    boards = [
        rank(read_board(find_results_files([folder]), tmp_path)) for folder in (tmp_path / "here", tmp_path / "shared")
    ]
    kept = [[row.model_dump(exclude={"file", "samples"}) for row in board.rows] for board in boards]
    assert kept[0] == kept[1] and not boards[1].problems
    assert add_run(file, tmp_path / "shared") == copy
    later = write_run(tmp_path / "later", [1, 1, 0], facts(), date="20261122_120000")
    assert add_run(later, tmp_path / "shared") == copy  # the same scores again
    assert len([*(tmp_path / "shared").rglob("*_results.json")]) == 1


def test_another_plan_is_another_run(tmp_path):
    for number, method in enumerate(("rtn", "awq")):
        hashed = {**HASHES, "plan_hash": str(number) * 64}
        add_run(write_run(tmp_path / method, [1, number, 0], facts(method) | hashed), tmp_path / "shared")
    assert len([*(tmp_path / "shared").rglob("*_results.json")]) == 2


def test_a_contradiction_is_refused(tmp_path):
    add_run(write_run(tmp_path / "a", [1, 1, 0], facts()), tmp_path / "shared")
    other = write_run(tmp_path / "b", [1, 0, 0], facts(), date="20261122_120000")
    with pytest.raises(QVLMError, match=r"is 0.333333, but .* in .* has 0.666667 for the same model, plan"):
        add_run(other, tmp_path / "shared")
    assert len([*(tmp_path / "shared").rglob("*_results.json")]) == 1


def overlap():
    return {"source": "x:test:4", "seed": 0, "documents_compared": 4, "documents_also_evaluated": 1}


def compared(count):
    return {"source": "x:train:4", "seed": 0, "documents_compared": count, "documents_also_evaluated": 0}


def resumed(generated, found):
    return facts(answers={"quiz": {"generated": generated, "found_in_cache": found, "parse_failures": 0}})


def write_without_images(folder, qvlm):
    rows = [{name: value for name, value in row.items() if name != "input_media"} for row in samples([1, 0])]
    return write(folder, content([1, 0], qvlm), rows)


def test_a_run_that_saw_all_images_or_answers_is_added(tmp_path):
    add_run(write_without_images(tmp_path / "whole", resumed(2, 0)), tmp_path / "shared")
    later = write_run(tmp_path / "cached", [1, 0], resumed(0, 2) | {"plan_hash": "7" * 64})
    add_run(later, tmp_path / "shared")


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda folder: write_run(folder, [1, 0]), "has no provenance"),
        (lambda folder: write_run(folder, [1, 0], facts(plan_hash="12")), "qvlm.plan_hash is not a SHA-256"),
        (lambda folder: write_run(folder, [1, 0], facts(), total=4), "2 of 4 documents were evaluated"),
        (lambda folder: write_run(folder, [1, 0], facts(calibration=overlap())), "calibrated on evaluated documents"),
        (lambda folder: write(folder, content([1, 0], facts())), "no samples of"),
        (lambda folder: write(folder, content([1, 0], facts()), samples([1])), "2 documents were evaluated, but"),
        (lambda folder: write(folder, content([1, 0], facts()), samples([1, 1])), "the samples' mean is 1"),
        (lambda folder: write_run(folder, [1, 0], facts(calibration=compared(1))), "not all documents compared"),
        (lambda folder: write_without_images(folder, facts()), "do not record the images of 2 documents"),
        (lambda folder: write_without_images(folder, resumed(0, 1)), "do not record the images of 2 documents"),
        (lambda folder: write_run(folder, [1, 0], facts(data={})), "does not record the source of its documents"),
        (lambda folder: write_run(folder, [1, 0], facts(calibration={"source": "x"})), "does not record whether"),
    ],
)
def test_runs_that_may_not_be_added(tmp_path, make, message):
    file = make(tmp_path / "run")
    with pytest.raises(QVLMError) as caught:
        add_run(file, tmp_path / "shared")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "shared").exists()


def test_edited_scores_are_refused(tmp_path):
    file = write_run(tmp_path / "run", [1, 0, 0], facts())
    whole = json.loads(file.read_text())
    whole["results"]["quiz"]["exact_match,none"] = 1.0
    file.write_text(json.dumps(whole))
    with pytest.raises(QVLMError, match="was edited after the run"):
        add_run(file, tmp_path / "shared")
