import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from report.logged import scored, write_run
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar

from qvlm_plugin.report.compare.comparison import choose_test, compare_outcomes, pool_seeds
from qvlm_plugin.report.compare.grid import cells, read_grid
from qvlm_plugin.report.compare.report import compare_report
from qvlm_plugin.report.paired import AVERAGE, compare
from qvlm_plugin.report.pooled import pool
from qvlm_plugin.report.runs import Outcome
from qvlm_plugin.report.samples import Document, RunSamples
from qvlm_plugin.report.significance import holm


def run(scores, images=None):
    images = images or [None] * len(scores)
    documents = [
        Document(index, "red", f"question {index}", str(score), image, {"exact_match": float(score)})
        for index, (score, image) in enumerate(zip(scores, images, strict=True))
    ]
    return RunSamples(Path("run"), None, {"quiz": tuple(documents)})


def chosen(one, other, images=None):
    baseline, compared = run(one, images), run(other, images)
    (row,) = compare(baseline, compared, "exact_match")
    return choose_test(row, baseline, compared, "exact_match")


@pytest.mark.parametrize("seed", range(5))
def test_scores_of_0_and_1_are_tested_by_mcnemar(seed):
    generator = np.random.default_rng(seed)
    one, other = generator.integers(0, 2, 40), generator.integers(0, 2, 40)
    table = [[((one == a) & (other == b)).sum() for b in (1, 0)] for a in (1, 0)]
    name, p = chosen(one, other)
    assert name == "McNemar" and p == pytest.approx(mcnemar(table, exact=True).pvalue)


@pytest.mark.parametrize("seed", range(5))
def test_soft_scores_are_tested_by_students_t(seed):
    generator = np.random.default_rng(seed)
    one, other = generator.choice([0, 0.3, 0.6, 1], 40), generator.choice([0, 0.3, 0.6, 1], 40)
    name, p = chosen(one, other)
    assert name == "paired t" and p == pytest.approx(stats.ttest_rel(one, other).pvalue)


def test_documents_that_share_an_image_are_not_independent():
    one, other = [1] * 12, [0] * 12
    name, p = chosen(one, other, [f"picture {index // 4}" for index in range(12)])
    assert name == "sign flip" and p == pytest.approx(2 * 0.5**3)
    assert chosen(one, other)[1] == pytest.approx(2 * 0.5**12)


def test_equal_runs():
    assert chosen([1, 0, 1], [1, 0, 1]) == ("McNemar", 1.0)
    assert chosen([0.3, 0.6, 1], [0.3, 0.6, 1]) == ("paired t", 1.0)


GRID = {"models": ("m",), "methods": ("qlora", "awq", "rtn"), "schemes": ("w4a4",), "tasks": ("quiz", "exam")}


def grid_of(**changes):
    return read_grid(None, GRID | changes)


WRONG = {"none": 2, "qlora": 20, "awq": 8, "rtn": 12}


def outcomes_of(folder, grid, wrong=None):
    """A run of each cell: of 40 documents so many are wrong, and one more for each unit of the seed."""
    found = []
    for one in cells(grid):
        count = (wrong or WRONG)[one.method] + (one.seed or 0)
        qvlm = {"method": one.method, "scheme": one.scheme, "bits": {}, "model_fingerprint": "f"}
        if one.seed is not None:
            qvlm["calibration"] = {"source": "x", "seed": one.seed}
        place = folder / one.cell.name
        results = write_run(place, {one.task: scored([0] * count + [1] * (40 - count))}, qvlm=qvlm)
        found.append(Outcome(one.cell, results, place / "log.txt", reused=False))
    return found


def without(outcomes, part):
    """Those whose cell's name has this part have failed."""
    return [dataclasses.replace(one, results=None) if part in one.cell.name else one for one in outcomes]


def test_comparison_with_full_precision(tmp_path):
    grid = grid_of()
    compared, trouble = compare_outcomes(grid, outcomes_of(tmp_path, grid))
    assert not trouble
    rows = {(one.grid_cell.method, one.grid_cell.task): one for one in compared}
    assert rows["none", "quiz"].comparison is None and rows["none", "quiz"].p is None
    qlora, awq, rtn = (rows[method, "quiz"] for method in ("qlora", "awq", "rtn"))
    assert (qlora.comparison.difference.value, awq.comparison.difference.value) == (-18 / 40, -6 / 40)
    assert (qlora.comparison.flips.broke, qlora.comparison.flips.fixed, qlora.comparison.flips.changed) == (18, 0, 0)
    assert qlora.test == "McNemar" and qlora.p == pytest.approx(2 * 0.5**18) and awq.p == pytest.approx(2 * 0.5**6)
    assert [one.adjusted for one in (qlora, awq, rtn)] == holm([qlora.p, awq.p, rtn.p] * 2)[:3]  # of six tests
    row = awq.row()
    assert row["difference"] == -0.15 and row["difference_low"] < -0.15 < row["difference_high"]
    assert row["right_to_wrong"] == 6 and row["seed"] == 0


def test_without_its_baseline_a_run_is_left_out(tmp_path):
    grid = grid_of()
    outcomes = outcomes_of(tmp_path, grid)
    compared, trouble = compare_outcomes(grid, without(outcomes, "none-w16a16/quiz"))
    assert {one.grid_cell.task for one in compared} == {"exam"} and len(compared) == 4
    assert sum("its baseline none w16a16 has no run" in line for line in trouble) == 3
    assert trouble[0].startswith("m/none-w16a16/quiz ended without results: its log is empty; log: ")
    grid = grid_of(baseline="qlora")
    compared, trouble = compare_outcomes(grid, without(outcomes, "none"))
    assert len(compared) == 6 and len(trouble) == 2


def test_runs_of_another_checkpoint_are_left_out(tmp_path):
    grid = grid_of(tasks=("quiz",))
    outcomes = outcomes_of(tmp_path, grid)
    content = json.loads(outcomes[1].results.read_text())
    content["qvlm"]["model_fingerprint"] = "g"
    outcomes[1].results.write_text(json.dumps(content))
    compared, (line,) = compare_outcomes(grid, outcomes)
    assert len(compared) == 3 and line.startswith("m/qlora-w4a4/quiz: ") and "are of different checkpoints" in line


def test_a_method_as_baseline_is_that_of_the_same_scheme_and_seed(tmp_path):
    grid = grid_of(schemes=("w4a4", "w6a6"), tasks=("quiz",), seeds=(0, 3), baseline="qlora")
    compared, trouble = compare_outcomes(grid, outcomes_of(tmp_path, grid))
    assert not trouble and len(compared) == 1 + 3 * 2 * 2
    for one in compared:
        if one.grid_cell.method in ("none", "qlora"):
            assert one.comparison is None
        else:  # one more is wrong for each unit of the seed, in both
            assert one.comparison.difference.value == pytest.approx((20 - WRONG[one.grid_cell.method]) / 40)
            assert one.comparison.baseline.value == pytest.approx(1 - (20 + one.grid_cell.seed) / 40)


def test_seeds_are_pooled(tmp_path):
    grid = grid_of(seeds=(0, 1, 2), baseline="qlora")
    compared, _ = compare_outcomes(grid, outcomes_of(tmp_path, grid))
    pooled = {(one.method, one.task): one for one in pool_seeds(grid, compared)}
    assert [*pooled] == [(m, task) for m in ("none", "qlora", "awq", "rtn") for task in ("quiz", "exam", AVERAGE)]
    samples = {
        (one.grid_cell.method, one.grid_cell.seed): one.samples for one in compared if one.grid_cell.task == "quiz"
    }
    (expected,) = pool([(samples["qlora", seed], samples["awq", seed]) for seed in range(3)], "exact_match")
    assert pooled["awq", "quiz"].pooled == expected and expected.scores == pytest.approx([0.8, 0.775, 0.75])
    average = pooled["awq", AVERAGE].pooled
    assert (average.documents, average.seeds, average.agreeing, average.holds) == (80, 3, 3, True)
    assert average.flips.fixed == 2 * 3 * 12
    ps = [one.pooled.t_p for one in pooled.values() if one.baseline]
    assert [one.adjusted for one in pooled.values() if one.baseline] == holm(ps) and len(ps) == 6
    assert pooled["qlora", "quiz"].baseline is None and pooled["qlora", "quiz"].pooled.spread == pytest.approx(0.025)
    assert pooled["none", "quiz"].pooled.seeds == 1 and pooled["none", "quiz"].pooled.spread is None


def test_a_run_without_draws_is_compared_with_each_seed_of_the_other(tmp_path):
    grid = grid_of(methods=("awq", "rtn"), schemes=("w4a16",), tasks=("quiz",), seeds=(1, 2, 3))
    for baseline, seeds, difference in (("none", {"awq": 3, "rtn": 1}, -10 / 40), ("awq", {"rtn": 3}, -2 / 40)):
        asked = grid.model_copy(update={"baseline": baseline})
        compared, trouble = compare_outcomes(asked, outcomes_of(tmp_path / baseline, asked))
        pooled = {one.method: one.pooled for one in pool_seeds(asked, compared) if one.baseline}
        assert not trouble and {method: row.seeds for method, row in pooled.items()} == seeds
        assert pooled["rtn"].difference.value == pytest.approx(difference)
        assert pooled["rtn"].drawn == (baseline == "awq")


def test_a_failed_seed_is_left_out_of_the_pooled_rows(tmp_path):
    grid = grid_of(seeds=(0, 1, 2))
    compared, trouble = compare_outcomes(grid, without(outcomes_of(tmp_path, grid), "awq-w4a4-seed1/exam"))
    seeds = {(one.method, one.task): one.pooled.seeds for one in pool_seeds(grid, compared)}
    assert [seeds["awq", task] for task in ("quiz", "exam", AVERAGE)] == [3, 2, 2] and len(trouble) == 1
    assert seeds["qlora", AVERAGE] == 3


def test_the_report_over_seeds(tmp_path):
    grid = grid_of(seeds=(0, 1, 2), baseline="qlora", tasks=("quiz",))
    compared, trouble = compare_outcomes(grid, outcomes_of(tmp_path, grid))
    report = compare_report(grid, compared, trouble, "qvlm compare")
    written = report.write(tmp_path / "report").read_text()
    assert written.startswith("# Comparison with qlora") and "from qlora with the same scheme and seed" in written
    first, second = report.tables
    assert [row[1:5] for row in first.rows[:3]] == [
        ("none", "w16a16", "", "quiz"),
        *(("qlora", "w4a4", seed, "quiz") for seed in "01"),
    ]
    awq = next(row for row in second.rows if row[1] == "awq")
    assert awq[4] == "3" and awq[6] == "2.5 (75.0 to 80.0)" and awq[7].startswith("+30.00 [+")
    assert awq[-2:] == ("3 of 3", "0 / 36 / 0")
    assert written.splitlines()[-4:-2] == ["## Verdict", ""]
    assert written.splitlines()[-2].startswith("- awq is 30.0 points above qlora [+")
    assert written.splitlines()[-2].endswith("over 3 seeds and 40 documents (all 3 seeds agree).")
    data = json.loads((tmp_path / "report" / "comparison.json").read_text())
    (row,) = (row for row in data["over_seeds"] if row["method"] == "awq")
    assert row["holds"] and row["seeds_of_same_sign"] == 3 and row["differences"] == pytest.approx([0.3] * 3)
    assert row["p_t"] <= row["p_t_holm"] and row["spread"] == pytest.approx(0.025) and len(data["verdicts"]) == 2


def test_the_report_of_one_seed_mentions_it(tmp_path):
    grid = grid_of(methods=("qlora",))
    report = compare_report(grid, *compare_outcomes(grid, outcomes_of(tmp_path, grid)), "qvlm compare")
    assert len(report.tables) == 1 and report.title == "Comparison with full precision"
    (sentence,) = report.verdicts
    assert sentence.startswith("qlora is 45.0 points below full precision [-")
    assert sentence.endswith("over 80 documents (one draw of calibration samples; another can change it).")


def test_schemes_and_models_are_named_if_there_are_several(tmp_path):
    grid = grid_of(models=("m", "n"), methods=("qlora",), schemes=("w4a4", "w6a6"), tasks=("quiz",))
    report = compare_report(grid, *compare_outcomes(grid, outcomes_of(tmp_path, grid)), "qvlm compare")
    starts = [f"{model}: qlora {scheme} is " for model in "mn" for scheme in ("w4a4", "w6a6")]
    assert [sentence[: len(start)] for sentence, start in zip(report.verdicts, starts, strict=True)] == starts


def test_a_score_of_all_documents_at_once_has_no_interval(tmp_path):
    """As of MME: documents log records, and the task says another number than their mean, here 1400 and 1250."""
    grid = grid_of(methods=("qlora",), tasks=("quiz",))
    outcomes = outcomes_of(tmp_path, grid)
    for outcome, total in zip(outcomes, (1400.0, 1250.0), strict=True):
        content = json.loads(outcome.results.read_text())
        content["results"]["quiz"]["exact_match,none"] = total
        outcome.results.write_text(json.dumps(content))
        (samples,) = outcome.results.parent.glob("*_samples_quiz.jsonl")
        rows = [json.loads(line) for line in samples.read_text().splitlines()]
        rows = [row | {"exact_match": {"category": "x", "score": row["exact_match"]}} for row in rows]
        samples.write_text("".join(json.dumps(row) + "\n" for row in rows))
    compared, trouble = compare_outcomes(grid, outcomes)
    assert not trouble
    report = compare_report(grid, compared, trouble, "qvlm compare")
    _, row = report.rows
    assert (row["score"], row["difference"], row["difference_low"], row["test"]) == (1250, -150, None, "McNemar")
    assert row["p"] == pytest.approx(2 * 0.5**18) and row["right_to_wrong"] == 18  # of the documents' own scores
    assert report.verdicts == ["qlora is 150 below full precision over 40 documents (one draw of calibration samples; "
                               "another can change it)."]  # fmt: skip
    assert any(note.startswith("quiz: exact_match is computed from all documents at once") for note in report.notes)
    assert any("as lmms-eval gives it" in note for note in report.notes)
