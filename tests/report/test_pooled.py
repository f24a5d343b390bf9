import dataclasses
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from qvlm_plugin.errors import QVLMError
from qvlm_plugin.report.estimates import clustered_mean
from qvlm_plugin.report.paired import AVERAGE, compare
from qvlm_plugin.report.pooled import pool, two_way_mean, verdict
from qvlm_plugin.report.samples import Document, RunSamples


def run(images=None, calibration=None, **tasks):
    """Scores by task; ``images`` name those of all tasks' documents by their ids."""
    read = {
        task: tuple(
            Document(i, "red", f"question {i}", str(score), images[i] if images else "", {"exact_match": float(score)})
            for i, score in enumerate(scores)
        )
        for task, scores in tasks.items()
    }
    return RunSamples(Path("run"), {"calibration": calibration}, read)


def drawn_pairs(seed, seeds=3, counts=(30, 17), images=10):
    """Pairs of runs with scores of 0, 0.3, … drawn, documents of both tasks sharing images."""
    generator = np.random.default_rng(seed)
    names = [f"picture {i % images}" for i in range(max(counts))]

    def one():
        tasks = {f"task{i}": generator.choice([0, 0.3, 0.6, 1], count) for i, count in enumerate(counts)}
        return run(names, **tasks)

    return [(one(), one()) for _ in range(seeds)]


def figures(row):
    """All numbers of a row, which must not depend on any order; those of seeds sorted."""
    numbers = [row.documents, row.clusters, row.t_p, row.sign_flip_p, row.agreeing, *dataclasses.astuple(row.flips)]
    for estimate in (row.baseline, row.score, row.difference):
        numbers += dataclasses.astuple(estimate)
    return [*numbers, *sorted(row.scores), *sorted(row.differences)]


@pytest.mark.parametrize("seed", range(3))
def test_one_seed_is_the_comparison_of_two_runs(seed):
    (pair,) = drawn_pairs(seed, seeds=1)
    rows, expected = pool([pair], "exact_match"), compare(*pair, "exact_match")
    assert [row.task for row in rows] == [row.task for row in expected] == ["task0", "task1", AVERAGE]
    for row, other in zip(rows, expected, strict=True):
        assert (row.baseline, row.score, row.difference) == (other.baseline, other.score, other.difference)
        assert (row.documents, row.clusters, row.flips) == (other.documents, other.clusters, other.flips)
        assert row.sign_flip_p == other.p and row.spread is None and row.agreeing == 1
        freedom = row.clusters - 1
        assert row.t_p == pytest.approx(2 * stats.t.sf(abs(row.difference.value) / row.difference.error, freedom))


def test_one_seed_of_independent_documents_is_the_paired_t_test():
    one, other = np.random.default_rng(0).choice([0, 0.3, 0.6, 1], (2, 40))
    (row,) = pool([(run(quiz=one), run(quiz=other))], "exact_match")
    expected = stats.ttest_rel(other, one)
    assert row.t_p == pytest.approx(expected.pvalue)
    assert (row.difference.low, row.difference.high) == pytest.approx(expected.confidence_interval(0.95))


def test_tiny_example_by_hand():
    """Two seeds, four documents: d = [1, 0, 1, 0] and [1, 1, 1, 0]."""
    plain = run(quiz=[0, 0, 0, 0])
    (row,) = pool([(plain, run(quiz=[1, 0, 1, 0])), (plain, run(quiz=[1, 1, 1, 0]))], "exact_match")
    assert row.differences == row.scores == (0.5, 0.75) and row.spread == pytest.approx(0.25 / np.sqrt(2))
    assert (row.difference.value, row.baseline.value, row.score.value) == (0.625, 0, 0.625)
    documents = np.var([1, 0.5, 1, 0], ddof=1) / 4
    seeds = np.var([0.5, 0.75], ddof=1) / 2
    assert row.difference.error == pytest.approx(np.sqrt(documents + seeds))
    freedom = (documents + seeds) ** 2 / (documents**2 / 3 + seeds**2 / 1)
    reach = stats.t.ppf(0.975, freedom) * row.difference.error
    assert (row.difference.low, row.difference.high) == pytest.approx((0.625 - reach, 0.625 + reach))
    assert row.t_p == pytest.approx(2 * stats.t.sf(0.625 / row.difference.error, freedom))
    signs = [abs(sum(s * d for s, d in zip(signs, (1, 0.5, 1), strict=True))) for signs in product((-1, 1), repeat=3)]
    assert row.sign_flip_p == pytest.approx(sum(total >= 2.5 for total in signs) / 8)
    assert dataclasses.astuple(row.flips) == (0, 5, 5) and (row.agreeing, row.seeds) == (2, 2)
    assert not row.holds and row.difference.low < 0 < row.difference.high


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_seeds_and_documents_does_not_matter(seed):
    pairs = drawn_pairs(seed)
    expected = [figures(row) for row in pool(pairs, "exact_match")]
    generator = np.random.default_rng(seed)

    def shuffled(one):
        tasks = {
            task: tuple(generator.permutation(np.array(documents, object))) for task, documents in one.tasks.items()
        }
        return dataclasses.replace(one, tasks=tasks)

    for changed in (pairs[::-1], [(shuffled(one), shuffled(other)) for one, other in pairs]):
        for row, numbers in zip(pool(changed, "exact_match"), expected, strict=True):
            assert figures(row) == pytest.approx(numbers)


def test_swapping_negates():
    pairs = drawn_pairs(5)
    back = pool([(other, one) for one, other in pairs], "exact_match")
    for row, other in zip(pool(pairs, "exact_match"), back, strict=True):
        assert row.difference.value == pytest.approx(-other.difference.value) and row.difference.value != 0
        assert row.difference.low == pytest.approx(-other.difference.high)
        assert (row.t_p, row.sign_flip_p) == pytest.approx((other.t_p, other.sign_flip_p))
        assert (row.flips.broke, row.flips.fixed) == (other.flips.fixed, other.flips.broke)


def test_equal_seeds_add_no_certainty():
    """The same runs again are no other documents; the seeds' part of the variance is then 0."""
    (pair,) = drawn_pairs(0, seeds=1)
    for once, thrice in zip(pool([pair], "exact_match"), pool([pair] * 3, "exact_match"), strict=True):
        assert dataclasses.astuple(thrice.difference) == pytest.approx(dataclasses.astuple(once.difference))
        assert thrice.t_p == pytest.approx(once.t_p) and thrice.spread == pytest.approx(0)
        assert thrice.flips.broke == 3 * once.flips.broke and thrice.documents == once.documents


def test_a_document_that_names_its_image_in_one_run_only_is_still_of_its_cluster():
    scores, images = [1, 1, 0, 0, 1, 0], ["a", "a", "b", "b", "c", "c"]
    named, bare, other = run(images, quiz=scores), run([None] * 6, quiz=scores), run(images, quiz=scores[::-1])
    expected = [figures(row) for row in pool([(named, other), (named, other)], "exact_match")]
    for pairs in ([(bare, other), (named, other)], [(named, other), (bare, other)]):
        assert [figures(row) for row in pool(pairs, "exact_match")] == expected


def simulated(generator, count, seeds, scales):
    """Values with means 0: of documents, seeds and both together, with these standard deviations; float64[seeds, n]."""
    documents, draws, both = scales
    return (
        documents * generator.normal(size=count)
        + draws * generator.normal(size=(seeds, 1))
        + both * generator.normal(size=(seeds, count))
    )


def coverage(estimate, scales, seeds, count=60, times=800):
    """How often an interval holds the mean."""
    generator, clusters = np.random.default_rng(0), [np.arange(count)]
    found = [estimate([simulated(generator, count, seeds, scales)], clusters) for _ in range(times)]
    return np.mean([one.low <= 0 <= one.high for one in found])


def both_ways(values, clusters):
    return two_way_mean(values, clusters)[0]


def documents_only(values, clusters):
    return clustered_mean([task.mean(axis=0) for task in values], clusters)


@pytest.mark.parametrize("seeds", [2, 3, 10])
@pytest.mark.parametrize("scales", [(1, 0, 0), (1, 0.13, 0), (0.1, 1, 0)], ids=["documents", "both", "seeds"])
def test_the_interval_has_its_nominal_coverage(scales, seeds):
    assert 0.93 <= coverage(both_ways, scales, seeds) <= 0.995


def test_the_interaction_makes_it_wider_not_narrower():
    assert coverage(both_ways, (0, 0, 1), 3) >= 0.97 and coverage(both_ways, (0.5, 0.05, 1), 3) >= 0.95


def test_documents_alone_would_be_surer_than_they_may():
    assert coverage(documents_only, (1, 0.2, 0), 3) < 0.87 and coverage(documents_only, (0.1, 1, 0), 3) < 0.2


def pooled(*differences, count=1000, calibration="drawn", name="quiz"):
    """Seeds in which this part of the documents rose or fell from a score of 0.5."""
    generator, pairs = np.random.default_rng(0), []
    for part in differences:
        scores = np.full(count, 0.5)
        scores[generator.permutation(count)[: round(abs(part) * count)]] += np.sign(part) / 2
        pairs.append((run(**{name: np.full(count, 0.5)}), run(calibration=calibration, **{name: scores})))
    (row,) = pool(pairs, "exact_match")
    return row


def test_a_verdict_that_holds_is_stated():
    row = pooled(0.06, 0.064, 0.056)
    low, high = (f"{100 * value:+.1f}" for value in (row.difference.low, row.difference.high))
    assert row.holds
    assert verdict(row, "a", "b") == f"a is 3.0 points above b [{low}, {high}] over 3 seeds and 1,000 documents " + (
        "(all 3 seeds agree)."
    )
    assert verdict(pooled(-0.06, -0.064, -0.056), "a", "b").startswith("a is 3.0 points below b [-")


def test_differences_that_depend_on_the_seed_do_not_hold():
    row = pooled(0.2, 0.02, -0.08)
    assert not row.holds and row.agreeing == 2 and row.sign_flip_p < 0.01 < 0.05 < row.t_p
    told = verdict(row, "a", "b")
    assert told.startswith("a cannot be told apart from b: +2.3 points [-") and "only 2 of 3 seeds agree" in told


def test_disagreeing_seeds_never_hold():
    row = pooled(*[0.06] * 30, -0.002)
    assert row.difference.low > 0 and row.agreeing == 30 and not row.holds


def test_a_single_draw_is_mentioned():
    told = verdict(pooled(0.06), "a", "b")
    assert told.endswith("over 1,000 documents (one draw of calibration samples; another can change it).")
    assert verdict(pooled(0.06, calibration=None), "a", "b").endswith("over 1,000 documents.")


def test_equal_runs_and_single_documents():
    row = pooled(0, 0)
    assert (row.t_p, row.sign_flip_p, row.agreeing, row.holds) == (1, 1, 2, False)
    assert verdict(row, "a", "b").startswith("a cannot be told apart from b: +0.0 points [-0.4, +0.4]")
    (alone,) = pool([(run(quiz=[0]), run(quiz=[1]))] * 2, "exact_match")
    assert np.isnan(alone.difference.error) and alone.t_p == 1 and not alone.holds
    assert "points over 2 seeds" in verdict(alone, "a", "b")
    (all_rose,) = pool([(run(quiz=[0] * 3), run(quiz=[1] * 3))], "exact_match")
    assert all_rose.difference.error == 0 and not all_rose.holds
    assert all_rose.t_p == all_rose.sign_flip_p == pytest.approx(0.25)


def test_mistakes():
    with pytest.raises(QVLMError, match="no runs"):
        pool([], "exact_match")
    pair, other = drawn_pairs(0, seeds=1), drawn_pairs(0, seeds=1, counts=(30, 16))
    with pytest.raises(QVLMError, match="do not cover the same documents of task task1"):
        pool(pair + other, "exact_match")
    with pytest.raises(QVLMError, match="metric 'f1'; allowed are exact_match"):
        pool(pair, "f1")
