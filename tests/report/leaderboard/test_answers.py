import json

import numpy as np
import pytest
from report.leaderboard.written import content, provenance, samples, write, write_run

from qvlm_plugin.report.leaderboard import answers
from qvlm_plugin.report.leaderboard.answers import answers_of
from qvlm_plugin.report.leaderboard.ranking import rank
from qvlm_plugin.report.leaderboard.reading import read_board
from qvlm_plugin.report.leaderboard.schema import find_results_files, samples_file
from qvlm_plugin.report.leaderboard.view import groups


def read(folder):
    board = rank(read_board(find_results_files([folder]), folder))
    (group,) = groups(board.rows)
    return answers_of(group, board.marks, folder), {row.run: row.method for row in board.rows}


def test_every_answer_can_be_read_back(tmp_path):
    generator = np.random.default_rng(0)
    told = {}
    for method in "abcde":
        right = (generator.random(60) < 0.9).astype(int).tolist()
        rows = samples(right)
        for row in rows:
            row["filtered_resps"] = "red" if row["exact_match"] else str(generator.choice(["blue", "green"]))
        write(tmp_path / method, content(right, provenance(method)), rows)
        told[method] = {row["doc_id"]: (row["filtered_resps"], row["exact_match"]) for row in rows}
    found, methods = read(tmp_path)
    differing = [index for index in range(60) if len({own[index] for own in told.values()}) > 1]
    assert [one.id for one in found.questions] == differing and found.differing == len(differing)
    for run, picks in found.picks.items():
        said = {one.id: one.outcomes[pick] for one, pick in zip(found.questions, picks, strict=True)}
        assert said == {index: told[methods[run]][index] for index in differing}
    assert found.questions[0].text == f"question {differing[0]}" and found.questions[0].target == "red"
    assert len({one.image for one in found.questions}) == len(differing)  # no images: each its own


def test_only_so_many_evenly_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(answers, "ANSWERS", 20)
    write_run(tmp_path / "a", [1] * 100, provenance("a"))
    write_run(tmp_path / "b", [0] * 100, provenance("b"))
    found, _ = read(tmp_path)
    assert found.differing == 100 and [one.id for one in found.questions] == [0, 11, 22, 33, 44, 55, 66, 77, 88, 99]


def test_long_texts_are_cut(tmp_path):
    for name, right in (("a", [1, 0]), ("b", [0, 1])):
        rows = [row | {"input": "x" * 9000, "target": "y" * 9000} for row in samples(right)]
        write(tmp_path / name, content(right, provenance(name)), rows)
    found, _ = read(tmp_path)
    assert len(found.questions[0].text) == answers.QUESTION and len(found.questions[0].target) == answers.ANSWER


def test_documents_of_one_picture_have_its_number(tmp_path):
    for name, right in (("a", [1, 0, 1]), ("b", [0, 1, 0])):
        rows = samples(right)
        rows[0]["input_media"] = rows[2]["input_media"] = ["sha256:1"]
        write(tmp_path / name, content(right, provenance(name)), rows)
    images = [one.image for one in read(tmp_path)[0].questions]
    assert images[0] == images[2] != images[1]


@pytest.mark.parametrize("harm", ["one run", "no samples", "changed since"])
def test_unknown_facts_are_left_out(tmp_path, harm):
    write_run(tmp_path / "a", [1, 0], provenance("a"))
    if harm == "no samples":
        write(tmp_path / "b", content([0, 1], provenance("b")))
    if harm == "changed since":
        file = write_run(tmp_path / "b", [0, 1], provenance("b"))
        board = rank(read_board(find_results_files([tmp_path]), tmp_path))
        samples_file(file, "quiz").write_text(json.dumps({"doc_id": 0}))
        assert answers_of(groups(board.rows)[0], board.marks, tmp_path) is None
        return
    assert read(tmp_path)[0] is None


def test_equal_answers_are_no_questions(tmp_path):
    for name in "ab":
        write_run(tmp_path / name, [1, 0], provenance(name))
    found, _ = read(tmp_path)
    assert found.differing == 0 and found.questions == () and len(found.picks) == 2
