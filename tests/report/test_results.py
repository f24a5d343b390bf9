import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.report.results import read_results, results_grid
from qvlm_plugin.report.shares import SHARES


def write(folder, name, score, *, effective=100, original=100, qvlm=None, metric="exact_match", **more):
    content = {
        "results": {
            "quiz": {
                "alias": "quiz",
                f"{metric},none": score,
                f"{metric}_stderr,none": 0.012,
                f"{metric}_stderr_clt,none": 0.012,
            }
        },
        "n-samples": {"quiz": {"original": original, "effective": effective}},
        **more,
    }
    if qvlm:
        content["qvlm"] = qvlm
    file = folder / f"{name}_results.json"
    file.write_text(json.dumps(content))
    return file


def test_scores_keep_their_error_count_and_provenance(tmp_path):
    (tmp_path / "deeper").mkdir()
    write(tmp_path / "deeper", "a", 0.5, effective=10, qvlm={"method": "rtn"})
    (score,) = read_results([tmp_path])
    assert (score.task, score.metric, score.value, score.stderr) == ("quiz", "exact_match", 0.5, 0.012)
    assert score.limited and score.documents == 10 and score.run == {"method": "rtn"}


def test_the_table_marks_stand_in_data_limits_and_foreign_runs(tmp_path):
    bits = {"decoder": {"weight": 4.127, "activation": 4.0}}
    qvlm = {"method": "qlora", "scheme": "w4a4", "bits": bits, "stand_in": True}
    files = [write(tmp_path, "a", 0.923, effective=50, qvlm=qvlm), write(tmp_path, "b", 0.5)]
    console = Console(width=200, record=True)
    console.print(results_grid(read_results(files)).rich())
    first, second = [line for line in console.export_text().splitlines() if "±" in line]
    assert all(
        text in first
        for text in ("qlora", "w4a4", "4.13 / 4", "92.3 ± 1.2", "50 documents per task, stand-in data, limited")
    )
    assert "50.0 ± 1.2" in second and "stand-in" not in second and "?" in second


@pytest.mark.parametrize(
    "metric, score, shown",
    [
        ("mme_perception_score", 1480.23, "1480.2 ± 0.012"),
        ("coco_CIDEr", 0.873, "0.873 ± 0.012"),  # from 0 to 10: no share, though it looks like one
        ("gpt_eval_score", 64.3, "64.3 ± 0.012"),
        ("acc", 64.3, "64.3 ± 0.012"),  # no share, though it is called like one
        ("acc", 0.643, "64.3 ± 1.2"),
        ("parse_failure", 1, "100.0 ± 1.2"),
    ],
)
def test_only_what_is_known_to_be_a_share_is_in_percent(tmp_path, metric, score, shown):
    grid = results_grid(read_results([write(tmp_path, "a", score, metric=metric)]))
    assert grid.rows[0][3] == shown
    assert grid.header[3] == f"quiz {metric}" + " (%)" * (shown.endswith("1.2"))


def test_a_column_has_one_unit(tmp_path):
    grid = results_grid(read_results([write(tmp_path, name, s, metric="acc") for name, s in (("a", 0.5), ("b", 50.0))]))
    assert grid.header[3] == "quiz acc" and [row[3] for row in grid.rows] == ["0.5 ± 0.012", "50 ± 0.012"]


def test_an_offset_leaves_documents_out(tmp_path):
    (score,) = read_results([write(tmp_path, "a", 0.5, effective=100, config={"offset": 3})])
    assert score.limited and results_grid([score]).rows[0][-1] == "100 documents per task, limited"
    (score,) = read_results([write(tmp_path, "a", 0.5, effective=100, config={"offset": 0})])
    assert not score.limited


def test_answers_that_were_not_scored_have_no_score(tmp_path):
    files = [write(tmp_path, "a", 999, metric="bypass"), write(tmp_path, "b", 0.5)]
    grid = results_grid(read_results(files))
    assert grid.header[3:] == ("quiz exact_match (%)", "notes")
    assert [row[3:] for row in grid.rows] == [
        ("", "100 documents per task, answers only, not scored"),
        ("50.0 ± 1.2", "100 documents per task"),
    ]
    assert "999" not in grid.markdown()


def test_documents_are_counted_for_each_task(tmp_path):
    file = write(tmp_path, "a", 0.5)
    content = json.loads(file.read_text())
    content["results"] |= {"exam": {"acc,none": 0.25}, "both": {"acc,none": 0.4}}  # a group has no documents of its own
    content["n-samples"]["exam"] = {"original": 7, "effective": 7}
    file.write_text(json.dumps(content))
    assert results_grid(read_results([file])).rows[0][-1] == "documents: quiz 100, exam 7"


def test_the_metrics_of_our_tasks_are_known():
    """Every one of them is a mean of values from 0 to 1."""
    files = sorted((Path(__file__).parents[2] / "tasks").glob("*.yaml"))
    listed = [re.findall(r"metric: \"?([\w-]+)", file.read_text()) for file in files]
    assert files and {name for names in listed for name in names} - {"submission"} <= SHARES


def test_markdown_has_the_same_cells(tmp_path):
    grid = results_grid(read_results([write(tmp_path, "a", 0.5)]))
    lines = grid.markdown().splitlines()
    assert len(lines) == 3 and lines[2] == "| " + " | ".join(grid.rows[0]) + " |"
    assert "50.0 ± 1.2" in lines[2]


def test_what_is_not_a_results_file_is_named(tmp_path):
    with pytest.raises(QVLMError, match=r"has no \*_results\.json"):
        read_results([tmp_path])
    file = write(tmp_path, "a", 0.5)
    file.write_text(file.read_text()[:30])
    with pytest.raises(QVLMError, match=r"a_results\.json is not a results file"):
        read_results([tmp_path])
