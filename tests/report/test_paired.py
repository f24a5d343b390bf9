from itertools import product
from math import comb, sqrt

import numpy as np
import pytest
import statsmodels.api as sm
from report.logged import sample, scored, write_run
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.report import paired
from qvlm_plugin.report.paired import (
    AVERAGE,
    clustered_mean,
    compare,
    holm,
    paired_grid,
    paired_notes,
    score_estimate,
    sign_flip_p,
)
from qvlm_plugin.report.pooled import pool, spread_text, verdict
from qvlm_plugin.report.samples import read_samples

SOFT = [0, 0.3, 0.6, 0.9, 1]


def enumerated_p(sums):
    totals = [abs(sum(sign * value for sign, value in zip(signs, sums, strict=True))) for signs in SIGNS[len(sums)]]
    return sum(total >= abs(sum(sums)) - 1e-9 for total in totals) / len(totals)


SIGNS = {count: list(product((-1, 1), repeat=count)) for count in range(1, 11)}


def write_runs(folder, *runs, **provenance):
    """Runs of samples by task; read back."""
    files = [
        write_run(folder / str(index), tasks, qvlm={"method": f"m{index}", "scheme": "w4a4", **provenance})
        for index, tasks in enumerate(runs)
    ]
    return [run for file in files for run in read_samples(file)]


@pytest.mark.parametrize("fell, rose", [(0, 0), (1, 0), (5, 5), (3, 11), (40, 7), (400, 90), (1, 200)])
def test_for_right_and_wrong_it_is_mcnemars_exact_test(fell, rose):
    count = fell + rose
    p = sign_flip_p(np.repeat([-1.0, 1.0, 0.0], (fell, rose, 50)) / (count + 50))
    assert p == pytest.approx(mcnemar([[30, fell], [rose, 20]], exact=True).pvalue, rel=1e-9)
    tail = sum(comb(count, k) for k in range(min(fell, rose) + 1))
    assert p == pytest.approx(min(1, 2 * tail / 2**count), rel=1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_it_is_exact_for_any_differences(seed):
    generator = np.random.default_rng(seed)
    real = generator.normal(0.4, 1, 9)
    soft = (generator.choice(SOFT, 10) - generator.choice(SOFT, 10)) / 30
    for sums in (real, soft, np.concatenate((soft[:5], real[:4]))):
        assert sign_flip_p(sums) == pytest.approx(enumerated_p(sums), rel=1e-9)
        assert sign_flip_p(-sums) == pytest.approx(sign_flip_p(sums), rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_drawn_and_exact_p_agree(monkeypatch, seed):
    generator = np.random.default_rng(seed)
    sums = np.concatenate((generator.choice([-0.3, 0.1, 0.6], 60), generator.choice([-1.0, 1.0], 40)))
    exact = sign_flip_p(sums)
    monkeypatch.setattr(paired, "_SUPPORT", 50)
    drawn = sign_flip_p(sums)
    assert drawn != exact and drawn == sign_flip_p(sums)
    assert drawn == pytest.approx(exact, abs=5 * sqrt(exact * (1 - exact) / 99_999) + 1e-5)
    assert sign_flip_p(np.abs(sums)) == 1 / 100_000  # never 0


def test_it_agrees_with_scipys_permutation_test():
    sums = np.random.default_rng(0).normal(0.1, 1, 60)
    expected = stats.permutation_test((sums,), np.sum, permutation_type="samples", n_resamples=9999, rng=0).pvalue
    assert sign_flip_p(sums) == pytest.approx(expected, abs=0.02) and 0.05 < expected < 0.95


def test_differences_that_cancel_in_each_cluster_are_no_evidence():
    assert sign_flip_p(np.array([0.1 + 0.2 - 0.3] * 20)) == 1


def values_of(count, seed=0):
    return np.random.default_rng(seed).choice(SOFT, count)


def test_without_clusters_it_is_the_paired_t_interval():
    values = values_of(40) - values_of(40, seed=1)
    estimate = clustered_mean([values], [np.arange(40)])
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (estimate.value, estimate.error) == pytest.approx((values.mean(), stats.sem(values)))
    assert (estimate.low, estimate.high) == pytest.approx((expected.low, expected.high))


def test_clustered_error_equals_the_sandwich_of_a_regression():
    values, clusters = values_of(60), np.random.default_rng(5).integers(0, 17, 60)
    fit = sm.OLS(values, np.ones(60)).fit(cov_type="cluster", cov_kwds={"groups": clusters})
    assert clustered_mean([values], [clusters]).error == pytest.approx(fit.bse[0])


def test_asking_the_same_twice_does_not_make_it_surer():
    values, clusters = values_of(30), np.arange(30)
    once, twice = clustered_mean([values], [clusters]), clustered_mean([np.tile(values, 2)], [np.tile(clusters, 2)])
    assert (twice.value, twice.error, twice.high) == pytest.approx((once.value, once.error, once.high))
    apart = clustered_mean([np.tile(values, 2)], [np.arange(60)])
    assert apart.error < 0.75 * once.error


def test_the_average_is_stratified_by_task():
    tasks = [values_of(30), values_of(80, seed=1), values_of(7, seed=2)]
    clusters = np.split(np.arange(117), [30, 110])
    average = clustered_mean(tasks, clusters)
    assert average.value == pytest.approx(np.mean([task.mean() for task in tasks]))
    assert average.error == pytest.approx(sqrt(sum(stats.sem(task) ** 2 for task in tasks)) / 3)
    shared = clustered_mean([tasks[0], tasks[0]], [clusters[0], clusters[0]])  # one set of images in two tasks
    assert shared.error == pytest.approx(stats.sem(tasks[0]))


def test_one_cluster_has_no_error():
    estimate = clustered_mean([np.array([0.0, 1.0])], [np.array([0, 0])])
    assert estimate.value == 0.5 and np.isnan(estimate.error)


def test_holm_is_monotone_and_adds_nothing_to_one_comparison():
    ps = np.random.default_rng(0).uniform(0, 0.1, 12).tolist()
    adjusted = holm(ps)
    assert all(p <= a <= 1 for p, a in zip(ps, adjusted, strict=True))
    assert np.argsort(adjusted, kind="stable").tolist() == sorted(range(12), key=lambda i: (adjusted[i], i))
    assert holm([0.04]) == [0.04]


@pytest.mark.parametrize("ps", [[0.04, 0.01, 0.01, 1.0], [0.9, 0.5, 0.7], [0.2] * 5, list(np.linspace(1e-6, 0.2, 40))])
def test_holm_agrees_with_statsmodels(ps):
    assert holm(ps) == pytest.approx(multipletests(ps, method="holm")[1].tolist(), rel=1e-12)


@pytest.mark.parametrize("count", [1, 2, 7, 100, 5000])
def test_the_fair_binomial_is_scipys(count):
    expected = stats.binom.pmf(np.arange(count + 1), count, 0.5)
    assert paired._fair_binomial(count) == pytest.approx(expected, rel=1e-9, abs=1e-300)


FIRST, SECOND = [1, 1, 1, 0, 1, 1], [1, 0, 0, 1, 1, 0]


def test_a_comparison_by_hand(tmp_path):
    baseline, other = write_runs(
        tmp_path,
        {"quiz": scored(FIRST), "soft": scored([1, 0.3, 0])},
        {"quiz": scored(SECOND, {1: "blue", 4: "Red"}), "soft": scored([0.3, 0.3, 0.6], {0: "x", 2: "y"})},
    )
    quiz, soft, average = compare(baseline, other, "exact_match")
    assert [row.task for row in (quiz, soft, average)] == ["quiz", "soft", AVERAGE]
    assert (quiz.baseline.value, quiz.score.value) == pytest.approx((5 / 6, 3 / 6))
    assert (quiz.documents, quiz.clusters, average.documents, average.clusters) == (6, 6, 9, 9)
    assert (quiz.flips.broke, quiz.flips.fixed, quiz.flips.changed) == (3, 1, 2)
    assert (soft.flips.broke, soft.flips.fixed, soft.flips.changed) == (1, 1, 2)
    assert (average.flips.broke, average.flips.fixed, average.flips.changed) == (4, 2, 4)
    assert quiz.p == pytest.approx(10 / 16) and soft.p == 1.0
    assert average.difference.value == pytest.approx((-2 / 6 + -0.1 / 3) / 2)
    differences = [*((b - a) / 12 for a, b in zip(FIRST, SECOND, strict=True)), -0.7 / 6, 0.6 / 6]
    assert average.p == pytest.approx(enumerated_p(differences))


def test_swapping_the_runs_negates(tmp_path):
    tasks = [{"quiz": scored(values_of(40, seed)), "more": scored(values_of(25, seed + 10))} for seed in (0, 1)]
    one, other = write_runs(tmp_path, *tasks)
    for there, back in zip(compare(one, other, "exact_match"), compare(other, one, "exact_match"), strict=True):
        assert there.difference.value == pytest.approx(-back.difference.value) and there.difference.value != 0
        assert there.difference.low == pytest.approx(-back.difference.high)
        assert there.p == pytest.approx(back.p) and there.baseline == back.score
        assert (there.flips.broke, there.flips.fixed) == (back.flips.fixed, back.flips.broke)


def test_identical_runs_do_not_differ(tmp_path):
    one, other = write_runs(tmp_path, *({"a": scored(FIRST), "b": scored(SECOND)} for _ in range(2)))
    for row in compare(one, other, "exact_match"):
        assert (row.difference.value, row.difference.error, row.p) == (0, 0, 1)
        assert (row.flips.broke, row.flips.fixed, row.flips.changed) == (0, 0, 0)


def test_images_make_clusters_within_and_across_tasks(tmp_path):
    def run(scores):
        return {
            task: [sample(index, score, input_media=[f"{index // 2}.png"]) for index, score in enumerate(scores)]
            for task in ("quiz", "more")
        }

    first, second = run([1, 1, 0, 0, 1, 1, 0, 0]), run([0, 0, 1, 0, 0, 0, 0, 0])
    quiz, more, average = compare(*write_runs(tmp_path, first, second), "exact_match")
    assert (quiz.documents, quiz.clusters, average.documents, average.clusters) == (8, 4, 16, 4)
    assert quiz.p == more.p == average.p == enumerated_p([-2, 1, -2]) == 0.5
    assert average.difference.error == pytest.approx(quiz.difference.error)
    apart = clustered_mean([np.array([-1, -1, 1, 0, -1, -1, 0, 0])], [np.arange(8)])
    assert quiz.difference.error > apart.error


def without_images(row):
    return {name: value for name, value in row.items() if name != "input_media"}


def test_unknown_images_are_never_taken_for_independent(tmp_path):
    def runs(folder, change):
        scored = [[1, 1, 0, 0], [0, 0, 0, 0]]
        return write_runs(folder, *({"quiz": [change(sample(i, s)) for i, s in enumerate(one)]} for one in scored))

    known = runs(tmp_path / "known", lambda row: row)
    (row,) = compare(*known, "exact_match")
    assert row.unknown == 0 and "taken as independent" in "\n".join(paired_notes(known[0], [row], "exact_match"))
    assert "?" not in "".join(paired_grid(known[0], [row]).rows[0])
    # of the first two documents, which share an image after all, a resumed run told nothing
    resumed = runs(tmp_path / "resumed", lambda row: without_images(row) if row["doc_id"] < 2 else row)
    (row,) = compare(*resumed, "exact_match")
    notes = "\n".join(paired_notes(resumed[0], [row], "exact_match"))
    assert row.unknown == 2 and "taken as independent" not in notes
    assert "4 documents, of 2 of which no run tells the image: whether they are independent is unknown" in notes
    assert paired_grid(resumed[0], [row]).rows[0][5:7] == (f"{row.p:.3f}?", f"{row.p:.3f}?")
    assert compare(known[0], resumed[1], "exact_match")[0].unknown == 0  # the other run tells
    pooled = pool([resumed, resumed], "exact_match")[0]
    assert pooled.unknown == 2 and "of unknown independence" in verdict(pooled, "a", "b")


def test_a_metric_may_belong_to_some_documents_but_to_the_same_ones(tmp_path):
    def run(having, score):
        quiz = [sample(index, 1, **({"acc_NAT": score} if index in having else {})) for index in range(4)]
        return {"quiz": quiz, "b": scored([1])}

    one, other, third = write_runs(tmp_path, run({1, 3}, 1), run({1, 3}, 0), run({1, 2, 3}, 0))
    (row,) = compare(one, other, "acc_NAT")  # one task, no average
    assert (row.documents, row.difference.value) == (2, -1)
    assert "left out, without acc_NAT: b" in paired_notes(one, [row], "acc_NAT")
    for runs in ((one, third), (third, one)):
        with pytest.raises(QVLMError, match=r"0/model/\w+\.json has no acc_NAT for document 2 of task quiz"):
            compare(*runs, "acc_NAT")
    with pytest.raises(QVLMError, match=r"metric 'f1'; allowed are acc_NAT, exact_match"):
        compare(one, other, "f1")


def wilson(right):
    """A share of 6 documents with its interval, in percent."""
    low, high = proportion_confint(right, 6, method="wilson")
    return f"{100 * right / 6:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def test_where_all_are_right_or_none_differs_the_interval_is_not_empty(tmp_path):
    right, same, wrong = write_runs(tmp_path, *({"quiz": scored([score] * 8)} for score in (1, 1, 0)))
    (row,) = compare(right, same, "exact_match")
    low, high = proportion_confint(8, 8, method="wilson")
    assert (row.score.low, row.score.high) == pytest.approx((low, high)) and row.score.wilson
    assert (row.difference.low, row.difference.high) == pytest.approx((low - 1, 1 - low))
    (row,) = compare(right, wrong, "exact_match")
    square = stats.norm.ppf(0.975) ** 2
    assert (row.difference.low, row.difference.high) == pytest.approx((-1, (square - 8) / (square + 8)))  # Tango 1998
    pooled = pool([(right, same)] * 3, "exact_match")[0]
    assert pooled.score.low == pytest.approx(low) and pooled.difference.high == pytest.approx(1 - low)


def test_the_average_of_shares_is_as_sure_as_its_tasks():
    values, clusters = [np.ones(4), np.ones(12)], [np.arange(4), np.arange(4, 16)]
    estimate = score_estimate(clustered_mean(values, clusters), values, clusters)
    assert estimate.low == pytest.approx(proportion_confint(12, 12, method="wilson")[0])  # 2² / (1/4 + 1/12) is 12
    twice = [np.repeat(task, 2) for task in clusters]  # documents that share images are no more sure
    doubled = score_estimate(estimate, [np.ones(8), np.ones(24)], twice)
    assert doubled.low == estimate.low
    values[1] = 1 - (np.arange(12) < 5.0)
    assert not score_estimate(clustered_mean(values, clusters), values, clusters).wilson  # five of either kind


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
        "quiz: 6 documents, taken as",
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


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    tasks = ({"quiz": scored(scores)} for scores in (FIRST, SECOND, SECOND))
    baseline, *others = write_runs(tmp_path, *tasks, method="rtn")
    grid = paired_grid(baseline, [row for run in others for row in compare(baseline, run, "exact_match")])
    assert [row[0] for row in grid.rows] == [f"rtn w4a4 ({run.file.parent.parent.name})" for run in others]
