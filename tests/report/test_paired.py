import numpy as np
import pytest
from report.logged import sample, scored
from report.paired_runs import FIRST, SECOND, enumerated_p, values_of, write_runs
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.report.estimates import clustered_mean
from qvlm_plugin.report.paired import AVERAGE, compare
from qvlm_plugin.report.paired_table import paired_grid, paired_notes
from qvlm_plugin.report.pooled import pool, verdict


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


def test_unknown_images_are_not_reported_as_independent(tmp_path):
    def runs(folder, change):
        scored = [[1, 1, 0, 0], [0, 0, 0, 0]]
        return write_runs(folder, *({"quiz": [change(sample(i, s)) for i, s in enumerate(one)]} for one in scored))

    known = runs(tmp_path / "known", lambda row: row)
    (row,) = compare(*known, "exact_match")
    assert row.unknown == 0 and "treated as independent" in "\n".join(paired_notes(known[0], [row], "exact_match"))
    assert "?" not in "".join(paired_grid(known[0], [row]).rows[0])
    # of the first two documents, which share an image after all, a resumed run told nothing
    resumed = runs(tmp_path / "resumed", lambda row: without_images(row) if row["doc_id"] < 2 else row)
    (row,) = compare(*resumed, "exact_match")
    notes = "\n".join(paired_notes(resumed[0], [row], "exact_match"))
    assert row.unknown == 2 and "treated as independent" not in notes
    assert "4 documents; the image of 2 is not recorded, so whether they are independent is unknown" in notes
    assert paired_grid(resumed[0], [row]).rows[0][5:7] == (f"{row.p:.3f}?", f"{row.p:.3f}?")
    assert compare(known[0], resumed[1], "exact_match")[0].unknown == 0  # the other run tells
    pooled = pool([resumed, resumed], "exact_match")[0]
    assert pooled.unknown == 2 and "of unknown independence" in verdict(pooled, "a", "b")


def test_a_metric_must_belong_to_the_same_documents_in_all_runs(tmp_path):
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


def test_the_interval_is_not_empty_if_all_are_right_or_none_differs(tmp_path):
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
