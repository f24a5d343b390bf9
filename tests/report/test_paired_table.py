from report.logged import sample, scored
from report.paired_runs import FIRST, SECOND, write_runs
from statsmodels.stats.proportion import proportion_confint

from qvlm_plugin.report.paired import AVERAGE, compare
from qvlm_plugin.report.paired_table import paired_grid, paired_notes
from qvlm_plugin.report.pooled import pool, spread_text, verdict


def wilson(right):
    """A share of 6 documents with its interval, in percent."""
    low, high = proportion_confint(right, 6, method="wilson")
    return f"{100 * right / 6:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def test_the_table_and_its_notes(tmp_path):
    runs = write_runs(tmp_path, *({"quiz": scored(s), "b": scored(s)} for s in (FIRST, SECOND, FIRST)), stand_in=True)
    rows = [row for run in runs[1:] for row in compare(runs[0], run, "exact_match")]
    grid = paired_grid(runs[0], rows)
    assert [row[:2] for row in grid.rows] == [(f"m{i} w4a4", task) for i in (1, 2) for task in ("b", "quiz", AVERAGE)]
    quiz = rows[1]
    low, high = 100 * quiz.difference.low, 100 * quiz.difference.high
    assert grid.rows[1][2:5] == (wilson(5), wilson(3), f"-33.33 [{max(low, -100):+.2f}, {high:+.2f}]")
    assert grid.rows[1][5:] == ("0.625", "1.000", "3 / 1 / 0")
    notes = "\n".join(paired_notes(runs[0], rows, "exact_match"))
    for text in (
        f"baseline: m0 w4a4, {runs[0].file}",
        "Holm over all 6 rows",
        "quiz: 6 documents, treated as",
        "stand-in",
    ):
        assert text in notes


def test_scores_of_another_unit_are_not_called_percent(tmp_path):
    def run(scores):
        return {"quiz": [sample(index, score, metric="rating") for index, score in enumerate(scores)]}

    baseline, other = write_runs(tmp_path, run([1200.5, 900.0]), run([1300.5, 1000.0]))
    (row,) = compare(baseline, other, "rating")
    cells = paired_grid(baseline, [row]).rows[0]
    assert cells[2].startswith("1050.2 ± ") and cells[3].startswith("1150.2 ± ") and cells[4].startswith("+100 [")
    assert "rating as lmms-eval gives it ±" in paired_notes(baseline, [row], "rating")[1]
    pooled = pool([(baseline, other)] * 2, "rating")[0]
    assert "+100" in verdict(pooled, "a", "b") or "is 100 above b" in verdict(pooled, "a", "b")
    assert "points" not in verdict(pooled, "a", "b") and spread_text(pooled) == "0 (1150.2 to 1150.2)"


def test_runs_with_equal_names_are_distinguished(tmp_path):
    tasks = ({"quiz": scored(scores)} for scores in (FIRST, SECOND, SECOND))
    baseline, *others = write_runs(tmp_path, *tasks, method="rtn")
    grid = paired_grid(baseline, [row for run in others for row in compare(baseline, run, "exact_match")])
    assert [row[0] for row in grid.rows] == [f"rtn w4a4 ({run.file.parent.parent.name})" for run in others]
