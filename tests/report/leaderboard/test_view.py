import pytest
from report.leaderboard.written import content, provenance, samples, write, write_run

from qvlm_plugin.report.leaderboard.ranking import rank
from qvlm_plugin.report.leaderboard.reading import read_board
from qvlm_plugin.report.leaderboard.schema import find_results_files
from qvlm_plugin.report.leaderboard.view import groups


def tables(folder):
    return groups(rank(read_board(find_results_files([folder]), folder)).rows)


def test_alone_a_title_is_task_data_and_documents(tmp_path):
    write_run(tmp_path / "a", [1, 0], provenance("a"))
    write_run(tmp_path / "b", [1, 1, 0], provenance("b"), total=40)
    found = tables(tmp_path)
    assert [one.title for one in found] == [
        "quiz (org/Quiz test, 2 documents)",
        "quiz (org/Quiz test, 3 of 40 documents)",
    ]
    assert [one.label for one in found] == ["quiz: 2", "quiz: 3 of 40"]


def prompt(whole):
    whole["configs"]["quiz"]["num_fewshot"] = 3


def revision(whole):
    whole["qvlm"]["data"]["quiz"]["revision"] = "b" * 40


def nothing(whole):
    whole.pop("qvlm")


@pytest.mark.parametrize(
    "change, expected", [(prompt, "prompt "), (revision, "data bbbbbbbb"), (nothing, "documents unknown")]
)
def test_evaluations_that_differ_have_titles_that_differ(tmp_path, change, expected):
    write_run(tmp_path / "a", [1, 0], provenance("a"))
    whole = content([1, 1], provenance("b"))
    change(whole)
    whole.get("qvlm", {}).pop("seal", None)
    write(tmp_path / "b", whole, None if change is nothing else samples([1, 1]))
    found = tables(tmp_path)
    assert len({one.title for one in found}) == len({one.label for one in found}) == 2
    assert any(expected in one.title and expected in one.label for one in found)


def test_different_questions_are_distinguished_by_hash(tmp_path):
    for name in "abc":
        rows = [row | {"input": f"{name}?"} for row in samples([1, 0])]
        write(tmp_path / name, content([1, 0], provenance(name)), rows)
    titles = [one.title for one in tables(tmp_path)]
    assert len(set(titles)) == 3 and all("documents " in title.partition(": ")[2] for title in titles)
