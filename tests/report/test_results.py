import json
import re
from pathlib import Path

import pytest
from rich.console import Console
from statsmodels.stats.proportion import proportion_confint

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.report.naming import labels
from qvlm_plugin.report.results import Grid, read_results, results_grid, results_notes
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


def shown(files, width):
    """The lines of the table on a terminal."""
    console = Console(width=width, record=True)
    console.print(results_grid(read_results(files)).rich(width))
    return [line.rstrip() for line in console.export_text().splitlines()]


def test_scores_keep_their_error_count_and_provenance(tmp_path):
    (tmp_path / "deeper").mkdir()
    write(tmp_path / "deeper", "a", 0.5, effective=10, qvlm={"method": "rtn", "scheme": "w4a4"})
    (score,) = read_results([tmp_path])
    assert (score.task, score.metric, score.value, score.stderr) == ("quiz", "exact_match", 0.5, 0.012)
    assert score.limited and score.documents == 10 and score.run == {"method": "rtn", "scheme": "w4a4"}


def test_the_table_marks_stand_in_data_limits_and_foreign_runs(tmp_path):
    bits = {"decoder": {"weight": 4.127, "activation": 4.0}}
    qvlm = {"method": "qlora", "scheme": "w4a4", "bits": bits, "stand_in": True}
    files = [write(tmp_path, "a", 0.923, effective=50, qvlm=qvlm), write(tmp_path, "b", 0.5)]
    first, counts, second, other_counts = [line for line in shown(files, 200) if "±" in line or "(n=" in line]
    assert all(
        text in first for text in ("qlora", "w4a4", "4.13 / 4", "92.3 ± 1.2", "stand-in data, not all documents")
    )
    assert "50.0 ± 1.2" in second and "stand-in" not in second and second.startswith(" –  ")
    assert (counts.strip(), other_counts.strip()) == ("(n=50)", "(n=100)")
    (line,) = [line for line in shown(files[:1], 200) if "±" in line]
    assert line.endswith("92.3 ± 1.2")  # what holds for all runs stands above and below the table
    scores = read_results(files[:1])
    assert results_notes(scores)[1] == "all runs: stand-in data, not all documents"
    assert results_grid(scores).header[-1] == "quiz exact_match (%), 50 documents"


@pytest.mark.parametrize(
    "metric, score, shown",
    [
        ("mme_perception_score", 1480.23, "1480.2 ± 0.012"),
        ("coco_CIDEr", 0.873, "0.873 ± 0.012"),  # from 0 to 10: no share, though it looks like one
        ("gpt_eval_score", 64.3, "64.3 ± 0.012"),
        ("acc", 64.3, "64.3 ± 0.012"),  # no share, though it is called like one
        ("acc", 0.643, "64.3 ± 1.2"),
        ("parse_failure", 1, "100.0 [96.3, 100.0]"),
    ],
)
def test_only_known_shares_are_in_percent(tmp_path, metric, score, shown):
    grid = results_grid(read_results([write(tmp_path, "a", score, metric=metric)]))
    assert grid.rows[0][-1] == shown
    assert grid.header[-1].split(",")[0] == f"quiz {metric}" + " (%)" * (not shown.endswith("0.012"))


def test_a_column_has_one_unit(tmp_path):
    grid = results_grid(read_results([write(tmp_path, name, s, metric="acc") for name, s in (("a", 0.5), ("b", 50.0))]))
    assert grid.header[-1] == "quiz acc, 100 documents"
    assert [row[-1] for row in grid.rows] == ["0.5 ± 0.012", "50 ± 0.012"]


def test_an_offset_leaves_documents_out(tmp_path):
    (score,) = read_results([write(tmp_path, "a", 0.5, effective=100, config={"offset": 3})])
    assert score.limited and results_notes([score])[-1] == "all runs: not all documents"
    (score,) = read_results([write(tmp_path, "a", 0.5, effective=100, config={"offset": 0})])
    assert not score.limited and "not all documents" not in str(results_notes([score]))


def test_answers_that_were_not_scored_have_no_score(tmp_path):
    files = [write(tmp_path, "a", 999, metric="bypass"), write(tmp_path, "b", 0.5)]
    grid = results_grid(read_results(files))
    assert grid.header[-2:] == ("quiz exact_match (%), 100 documents", "notes")
    assert [row[-2:] for row in grid.rows] == [("", "answers only, not scored"), ("50.0 ± 1.2", "")]
    assert "999" not in grid.markdown()


def test_documents_are_counted_for_each_task(tmp_path):
    file = write(tmp_path, "a", 0.5)
    content = json.loads(file.read_text())
    content["results"] |= {"exam": {"acc,none": 0.25}, "both": {"acc,none": 0.4}}  # a group has no documents of its own
    content["n-samples"]["exam"] = {"original": 7, "effective": 7}
    file.write_text(json.dumps(content))
    *_, both, exam, quiz = results_grid(read_results([file])).header
    assert (both, exam) == ("both acc (%)", "exam acc (%), 7 documents") and quiz.endswith("(%), 100 documents")


def test_a_share_of_few_documents_has_wilsons_interval(tmp_path):
    def text(right, documents, **more):
        p = right / documents
        metrics = {"exact_match,none": p, "exact_match_stderr,none": (p * (1 - p) / (documents - 1)) ** 0.5, **more}
        file = write(tmp_path, "a", 0.5, effective=documents, original=documents)
        content = json.loads(file.read_text()) | {"results": {"quiz": metrics}}
        file.write_text(json.dumps(content))
        return results_grid(read_results([file])).rows[0][5:]

    for right, documents in ((4, 4), (0, 4), (19, 20), (1, 2)):
        low, high = proportion_confint(right, documents, method="wilson")
        assert text(right, documents) == (f"{100 * right / documents:.1f} [{100 * low:.1f}, {100 * high:.1f}]",)
    assert text(15, 20) == ("75.0 ± 9.9",)
    # A soft score's error is smaller; of a class nobody knows how many documents are in it.
    soft = {"exact_match_stderr,none": 0.03, "IMG,none": 1.0, "IMG_stderr,none": 0.0}
    assert text(19, 20, **soft) == ("95.0 ± 3.0", "100.0")


def test_runs_are_named_by_their_differences_or_else_by_their_folders(tmp_path):
    facts = {"method": "rtn", "scheme": "w4a4", "pretrained": "hub/llava"}
    files = []
    for name, more in (("a", {"backend": "packed"}), ("b", {"backend": "reference"}), ("c", {"backend": "packed"})):
        (tmp_path / name / "llava").mkdir(parents=True)
        files.append(write(tmp_path / name / "llava", "x", 0.5, qvlm={**facts, **more}))
    grid = results_grid(read_results(files[:2]))
    assert grid.header[:3] == ("method", "scheme", "backend") and grid.lead == 3
    assert [row[2] for row in grid.rows] == ["packed", "reference"]
    seeded = {
        file: {**facts, "method": m, "calibration": s}
        for file, m, s in zip(files, "ab", ({"seed": 0}, None), strict=False)
    }
    assert labels(seeded) == {files[0]: "a w4a4", files[1]: "b w4a4"}  # one has no seed
    assert labels({**seeded, files[2]: {**facts, "calibration": {"seed": 1}}})[files[2]] == "rtn w4a4 (1)"
    grid = results_grid(read_results([tmp_path]))
    assert [row[2:4] for row in grid.rows] == [("packed", "a"), ("reference", "–"), ("packed", "c")]
    assert labels({file: {**facts, "backend": "packed"} for file in files[::2]}) == {
        files[0]: "rtn w4a4 (a)", files[2]: "rtn w4a4 (c)"
    }  # fmt: skip


@pytest.mark.parametrize("width", [60, 80, 130])
def test_tables_keep_the_width_of_the_terminal(tmp_path, width):
    files = []
    for name in ("one", "two"):
        file = write(tmp_path, name, 0.5, qvlm={"method": "qvlm_rotated", "scheme": "w4a4+vision:w8a8"})
        tasks = {
            f"a_task_with_a_long_name_{n}": {"exact_match,none": 0.5, "exact_match_stderr,none": 0.1} for n in range(5)
        }
        counts = {task: {"original": 9, "effective": 9} for task in tasks}
        file.write_text(json.dumps(json.loads(file.read_text()) | {"results": tasks, "n-samples": counts}))
        files.append(file)
    lines = shown(files, width)
    assert max(map(len, lines)) <= width
    assert "\n".join(lines).count("50.0 ± 10.0") == 10 and "…" not in "\n".join(lines)


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


def test_invalid_results_files_are_named(tmp_path):
    with pytest.raises(QVLMError, match=r"contains no \*_results\.json"):
        read_results([tmp_path])
    file = write(tmp_path, "a", 0.5)
    file.write_text(file.read_text()[:30])
    with pytest.raises(QVLMError, match=r"a_results\.json is not a results file"):
        read_results([tmp_path])


@pytest.mark.parametrize("width", [36, 50, 64, 80, 120])
def test_a_narrow_terminal_breaks_names_at_words_and_cuts_no_figure(width):
    figures = ("71.7 ± 5.9", "-10.00 [-20.31, +0.31]", "0.109", "19 / 8 / 64")
    grid = Grid(("run", "task", *"abcd"), (("qlora w4a4", "vizwiz_vqa_val", *figures),), lead=2)
    console = Console(width=width, record=True)
    console.print(grid.rich(width))
    text = console.export_text()
    assert all(figure.partition(" [")[0] in text for figure in figures) and "[-20.31, +0.31]" in text
    assert "vizwiz_vqa_val" in text and max(map(len, text.splitlines())) <= width


def test_files_of_one_run_on_several_tasks_are_one_row(tmp_path):
    bits = {"decoder": {"weight": 4.1, "activation": 4.0}}
    for number, (plan, task) in enumerate((("a", "quiz"), ("b", "quiz"), ("a", "exam"), ("b", "exam"), ("b", "exam"))):
        facts = {"method": "rtn", "scheme": "w4a4", "pretrained": "llava", "plan_hash": plan, "bits": bits}
        (tmp_path / f"{number}").mkdir()
        file = write(tmp_path / f"{number}", "x", number / 10, qvlm=facts)
        content = json.loads(file.read_text())
        content["results"] = {task: content["results"]["quiz"] | {"IMG,none": 0.75}}
        file.write_text(json.dumps(content | {"n-samples": {task: {"original": 100, "effective": 100}}}))
    grid = results_grid(read_results([tmp_path]))
    assert [name.partition(" (%)")[0] for name in grid.header[5:]] == [
        "exam exact_match", "quiz exact_match", "exam IMG", "quiz IMG"
    ]  # fmt: skip
    figures = [[cell.partition(" ")[0] for cell in row[5:7]] for row in grid.rows]
    assert figures == [["20.0", "0.0"], ["30.0", "10.0"], ["40.0", ""]]
    assert [row[2] for row in grid.rows] == [
        "0",
        "1",
        "4",
    ]  # folders of the first files: two plans, one evaluated twice


def test_names_stay_whole_where_one_column_of_figures_fits_beside_them():
    header = ("method", "scheme", "folder", "task exact_match", "other exact_match")
    rows = (("qvlm_rotated", "w4a4", "qvlm_rotated-w4a4/scienceqa", "98.0 [93.0, 99.4]", "97.0 [91.5, 99.0]"),)
    console = Console(width=80, record=True)
    console.print(Grid(header, rows, lead=3).rich(80))
    text = console.export_text()
    assert text.count("qvlm_rotated  w4a4    qvlm_rotated-w4a4/scienceqa") == 2
    assert max(map(len, text.splitlines())) <= 80
